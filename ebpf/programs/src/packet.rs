//! A packet in an skb, read and written in place: the only place that turns `data` and `data_end` into pointers.

use core::ptr;

use aya_ebpf::programs::TcContext;

/// Bounds-checked pointer into the linear part of the packet; `None` when it ends before `offset + size_of::<T>()`.
///
/// The pointer is invalid after any helper that may move the packet (pull, change, store).
#[inline(always)]
pub fn at<T>(ctx: &TcContext, offset: usize) -> Option<*mut T> {
    let start = ctx.data() + offset;
    if start + size_of::<T>() > ctx.data_end() {
        return None;
    }
    Some(ptr::with_exposed_provenance_mut(start))
}
