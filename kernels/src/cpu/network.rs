//! Sorting many short columns at once: a network of comparisons between whole rows.

/// Values that are compared at once.
const LANES: usize = 16;

/// Values whose minimum and maximum are one instruction each.
pub(crate) trait Ordered: Copy {
    fn sorted(self, other: Self) -> (Self, Self);
}

impl Ordered for u32 {
    #[inline(always)]
    fn sorted(self, other: Self) -> (Self, Self) {
        (self.min(other), self.max(other))
    }
}

/// Neither value may be NaN; of two zeros the order is open.
impl Ordered for f32 {
    #[inline(always)]
    fn sorted(self, other: Self) -> (Self, Self) {
        // Two choices of one value each, which become a minimum and a maximum.
        let low = if self < other { self } else { other };
        let high = if self < other { other } else { self };
        (low, high)
    }
}

/// Sorts every column of a row-major matrix, smallest first.
///
/// Batcher's odd-even merge sort (Knuth, The Art of Computer Programming, volume 3, algorithm
/// 5.2.2M): 19 comparisons of rows for 8 rows, 63 for 16.
#[inline(always)]
pub(crate) fn sort_columns<T: Ordered>(rows: &mut [T], width: usize) {
    let count = rows.len() / width.max(1);
    if count < 2 {
        return;
    }
    let top = count.next_power_of_two() / 2;
    let mut p = top;
    while p > 0 {
        let (mut q, mut r, mut d) = (top, 0, p);
        loop {
            for i in 0..count - d {
                if i & p == r {
                    compare(rows, width, i, i + d);
                }
            }
            if q == p {
                break;
            }
            d = q - p;
            q /= 2;
            r = p;
        }
        p /= 2;
    }
}

#[inline(always)]
fn compare<T: Ordered>(rows: &mut [T], width: usize, low: usize, high: usize) {
    let (before, after) = rows.split_at_mut(high * width);
    let (lows, low_rest) = before[low * width..][..width].as_chunks_mut::<LANES>();
    let (highs, high_rest) = after[..width].as_chunks_mut::<LANES>();
    for (low, high) in lows.iter_mut().zip(highs) {
        // Copies, so that no store can change what is yet to be read: whole vectors.
        let (mut least, mut most) = (*low, *high);
        for (least, most) in least.iter_mut().zip(&mut most) {
            (*least, *most) = least.sorted(*most);
        }
        (*low, *high) = (least, most);
    }
    for (low, high) in low_rest.iter_mut().zip(high_rest) {
        (*low, *high) = low.sorted(*high);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_column_of_zeros_and_ones_is_sorted() {
        // A network that sorts these sorts everything (the zero-one principle).
        for count in 0..=12_usize {
            let width = 1 << count;
            let mut rows: Vec<u32> = (0..count)
                .flat_map(|row| {
                    (0..width).map(move |column: usize| u32::from(column >> row & 1 == 1))
                })
                .collect();
            sort_columns(&mut rows, width);
            for column in 0..width {
                let sorted: Vec<u32> = (0..count).map(|row| rows[row * width + column]).collect();
                assert!(sorted.is_sorted(), "{count} rows, column {column:b}");
                let ones = sorted.iter().sum::<u32>();
                assert_eq!(ones, (column as u64).count_ones());
            }
        }
    }
}
