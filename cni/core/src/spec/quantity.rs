//! Kubernetes' quantities, as its annotations for bandwidth have them (`k8s.io/apimachinery`, `resource.Quantity`).

use std::num::NonZeroU64;

/// A Kubernetes quantity of whole units: `1500000`, `10M`, `64Ki`, `1e6`, `1.5G`.
pub(super) fn quantity(text: &str) -> Option<NonZeroU64> {
    let end = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let factor: u64 = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        exponent => {
            let power = exponent.strip_prefix(['e', 'E'])?.parse().ok()?;
            10_u64.checked_pow(power)?
        }
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let digits = u32::try_from(fraction.len()).ok()?;
    let scale = 10_u128.checked_pow(digits)?;
    let number: u128 = format!("{whole}{fraction}").parse().ok()?;
    let bits = number.checked_mul(factor.into())?.div_ceil(scale);
    NonZeroU64::new(u64::try_from(bits).ok()?)
}
