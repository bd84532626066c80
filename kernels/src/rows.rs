//! Rows of several items, one after the other.

/// Where the rows of each item start.
#[derive(Clone, Debug)]
pub(crate) struct Rows {
    /// One more than items.
    starts: Vec<usize>,
}

impl Rows {
    /// Items of so many rows.
    pub(crate) fn new(counts: impl IntoIterator<Item = usize>) -> Self {
        let mut starts = vec![0];
        let mut end = 0_usize;
        for count in counts {
            end = end.saturating_add(count);
            starts.push(end);
        }
        Self { starts }
    }

    /// Rows of all items.
    pub(crate) fn len(&self) -> usize {
        self.starts[self.starts.len() - 1]
    }

    /// Item of a row, and the row's index there.
    pub(crate) fn find(&self, row: usize) -> (usize, usize) {
        let item = self.starts.partition_point(|&start| start <= row) - 1;
        (item, row - self.starts[item])
    }

    /// First row of an item.
    pub(crate) fn start(&self, item: usize) -> usize {
        self.starts[item]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_without_rows_are_passed_over() {
        let rows = Rows::new([2, 0, 0, 3]);
        let found: Vec<_> = (0..rows.len()).map(|row| rows.find(row)).collect();
        assert_eq!(found, [(0, 0), (0, 1), (3, 0), (3, 1), (3, 2)]);
        assert_eq!(Rows::new([]).len(), 0);
    }
}
