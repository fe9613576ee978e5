//! The only clock: CLOCK_BOOTTIME with the boot's identity. A time namespace may shift it; the store then sees a clock that
//! stepped, which only lengthens a cooldown within one boot.

use std::time::Duration;

use kun_cni_core::ipam::{BootId, BootTime};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Why the boot is unknown.
#[derive(Debug, thiserror::Error)]
pub enum ClockError {
    /// The kernel does not tell it.
    #[error("{BOOT_ID}: {0}")]
    Read(#[from] std::io::Error),
    /// Not a UUID.
    #[error("{BOOT_ID}: `{0}` is not a UUID")]
    Parse(String),
}

/// Now.
pub fn now() -> BootTime {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(t.tv_sec).expect("CLOCK_BOOTTIME begins at zero");
    let nanoseconds = u32::try_from(t.tv_nsec).expect("a timespec's nanoseconds are below 10^9");
    BootTime(Duration::new(seconds, nanoseconds))
}

/// This boot.
pub fn boot() -> Result<BootId, ClockError> {
    let text = std::fs::read_to_string(BOOT_ID)?;
    let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
    match u128::from_str_radix(&digits, 16) {
        Ok(id) if digits.len() == 32 => Ok(BootId(id)),
        Ok(_) | Err(_) => Err(ClockError::Parse(text.trim().to_owned())),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_kernel_tells_its_boot_and_time_goes_on() {
        assert_eq!(super::boot().unwrap(), super::boot().unwrap());
        let before = super::now();
        assert!(super::now() >= before);
    }
}
