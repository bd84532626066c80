//! From a next-byte distribution to the codes of one position.

use crate::code;
use crate::cpu::masses::{Dense, END};
use crate::records::{RecordShape, Records};

/// Lists the symbols of `mass` as one position; what is listed is set to zero. `unseen` is the mass that is no symbol's:
/// it goes to the tail, and with it `mass` is a distribution.
pub(crate) fn encode(
    mass: &mut Dense,
    unseen: f64,
    shape: &RecordShape,
    candidates: &mut Vec<(f64, u8)>,
    records: &mut Records,
) {
    let end = mass[END];
    let fill = f64::from(shape.fill_permille) / 1000.0;
    // Symbols below this hold less than the rest that the fill leaves, all of them together.
    let cutoff = ((1.0 - fill) / 256.0).max(f64::MIN_POSITIVE);
    candidates.clear();
    let bytes = || (0..=u8::MAX).zip(&mass[..END]);
    candidates.extend(
        bytes()
            .filter(|&(_, &mass)| mass >= cutoff)
            .map(|(byte, &mass)| (mass, byte)),
    );
    if candidates.is_empty() {
        let likeliest = bytes().fold((mass[0], 0), |best, (byte, &mass)| {
            if mass > best.0 { (mass, byte) } else { best }
        });
        candidates.push(likeliest);
    }
    candidates.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut filled = end;
    let mut kept = 0;
    for &(listed, byte) in candidates.iter().take(shape.k) {
        if kept > 0 && filled >= fill {
            break;
        }
        filled += listed;
        kept += 1;
        mass[usize::from(byte)] = 0.0;
    }
    let tail = mass[..END].iter().sum::<f64>() + unseen;
    candidates.truncate(kept);
    candidates.sort_unstable_by_key(|&(_, byte)| byte);
    let mut listed = [(0, 0); 256];
    for (slot, &(mass, byte)) in listed.iter_mut().zip(&*candidates) {
        *slot = (byte, code::encode(mass));
    }
    records.push(&listed[..kept], code::encode(end), code::encode(tail));
}
