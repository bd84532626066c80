//! Rows of a table `[count, width]`, chosen by number.

/// Copies rows `ids` of `table` to `out`.
///
/// # Panics
/// Where the table does not have such a row.
pub fn gather(table: &[f32], ids: &[u32], width: usize, out: &mut [f32]) {
    for (out, &id) in out.chunks_exact_mut(width).zip(ids) {
        out.copy_from_slice(&table[id as usize * width..][..width]);
    }
}

/// Adds each row of `rows` to the row of `table` that `ids` names: the gradient of [`gather`].
///
/// # Panics
/// Where the table does not have such a row.
pub fn scatter(rows: &[f32], ids: &[u32], width: usize, table: &mut [f32]) {
    for (row, &id) in rows.chunks_exact(width).zip(ids) {
        add(row, &mut table[id as usize * width..][..width]);
    }
}

/// `sum = sum + term`, value by value.
pub fn add(term: &[f32], sum: &mut [f32]) {
    for (sum, term) in sum.iter_mut().zip(term) {
        *sum += term;
    }
}

/// Moves row `order[r]` to place `r`, for a permutation, with no second table: each cycle of it is walked once.
///
/// # Panics
/// Where `order` is not a permutation of the rows.
pub fn permute(rows: &mut [f32], order: &[u32], width: usize) {
    let mut first = vec![0f32; width];
    let mut is_placed = vec![false; order.len()];
    for start in 0..order.len() {
        if is_placed[start] {
            continue;
        }
        first.copy_from_slice(&rows[start * width..][..width]);
        let mut at = start;
        loop {
            is_placed[at] = true;
            let from = order[at] as usize;
            if from == start {
                rows[at * width..][..width].copy_from_slice(&first);
                break;
            }
            rows.copy_within(from * width..(from + 1) * width, at * width);
            at = from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_moved_in_place_are_those_that_a_copy_gathers() {
        let width = 3;
        let order = [4, 1, 0, 5, 2, 3, 6];
        let rows: Vec<f32> = (0..21u8).map(f32::from).collect();
        let mut want = vec![0.0; rows.len()];
        gather(&rows, &order, width, &mut want);
        let mut got = rows;
        permute(&mut got, &order, width);
        assert_eq!(got, want);
    }

    #[test]
    fn rows_of_one_number_are_added_up() {
        let rows: Vec<f32> = (0..6u8).map(f32::from).collect();
        let mut table = vec![1.0; 8];
        scatter(&rows, &[3, 0, 3], 2, &mut table);
        assert_eq!(table, [3.0, 4.0, 1.0, 1.0, 1.0, 1.0, 5.0, 7.0]);
    }
}
