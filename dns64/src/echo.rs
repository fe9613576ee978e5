//! The yardstick of the bench: the fast lane's batches around nothing. Serves nobody.

use std::io;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sys::Batch;

/// Sends every datagram back until `stop`; the socket has a read timeout.
pub fn serve(socket: &UdpSocket, stop: &AtomicBool) -> io::Result<()> {
    let mut batch = Batch::default();
    while !stop.load(Ordering::Relaxed) {
        let served = batch.serve(socket, |datagram, _, out| {
            out.clear();
            out.extend_from_slice(datagram);
            true
        });
        match served {
            Err(e)
                if !matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                return Err(e);
            }
            _ => {}
        }
    }
    Ok(())
}
