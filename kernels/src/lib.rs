//! Numeric operations of Consilium on slices.
