//! Frozen matrices in fewer bits: stored once, decoded a few rows at a time on the way into a product.
//!
//! Rows are decoded alone, so that a panel of them fits a core's cache and the matrix never exists as
//! `f32`. Formats:
//!
//! | format | code | scale | bytes per weight |
//! |---|---|---|---|
//! | [`Format::F32`] | the value | | 4 |
//! | [`Format::Bf16`] | its upper half, rounded to nearest, ties to even | | 2 |
//! | [`Format::Int8`] | -127..=127 | largest magnitude of the row over 127 | 1 + 4 / columns |
//! | [`Format::Nf4`] | one of 16 levels | largest magnitude of 64 neighbours, itself 8 bits | 0.516 |
//!
//! NF4 and the quantisation of its scales: QLoRA (Dettmers et al. 2023, section 3 and appendix E),
//! <https://arxiv.org/abs/2305.14314>. Blocks of 64 do not cross rows here: the last of a row may be
//! shorter.

mod codes;
mod nf4;
#[cfg(test)]
mod tests;

use nf4::{BLOCK, Scales};

/// How a frozen matrix is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Single precision.
    #[default]
    F32,
    /// The upper half of single precision.
    Bf16,
    /// 8 bits, one scale a row.
    Int8,
    /// 4-bit NormalFloat, blocks of 64, scales of 8 bits.
    Nf4,
}

impl Format {
    /// Names in settings.
    pub const NAMES: [(&'static str, Self); 4] = [
        ("f32", Self::F32),
        ("bf16", Self::Bf16),
        ("int8", Self::Int8),
        ("nf4", Self::Nf4),
    ];

    /// The format of a name of [`Self::NAMES`].
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let found = Self::NAMES.into_iter().find(|(known, _)| *known == name);
        found.map(|(_, format)| format)
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Nf4 => "nf4",
        }
    }

    /// Bytes of codes of a row.
    #[must_use]
    pub fn row_bytes(self, columns: usize) -> usize {
        match self {
            Self::F32 => 4 * columns,
            Self::Bf16 => 2 * columns,
            Self::Int8 => columns,
            Self::Nf4 => columns.div_ceil(2),
        }
    }

    /// Bytes of the scales of a matrix.
    #[must_use]
    pub fn scale_bytes(self, rows: usize, columns: usize) -> usize {
        match self {
            Self::F32 | Self::Bf16 => 0,
            Self::Int8 => rows * size_of::<f32>(),
            Self::Nf4 => Scales::bytes_of(rows * columns.div_ceil(BLOCK)),
        }
    }
}

/// A stored matrix. Its codes may live elsewhere, for instance in a file: see [`Packed::take_codes`].
#[derive(Clone, Debug, PartialEq)]
pub struct Packed {
    rows: usize,
    columns: usize,
    format: Format,
    codes: Vec<u8>,
    steps: Steps,
}

/// Scales of a matrix.
#[derive(Clone, Debug, PartialEq)]
enum Steps {
    None,
    /// One a row.
    Rows(Vec<f32>),
    Blocks(Scales),
}

/// Some rows of a stored matrix.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    first: usize,
    rows: usize,
    columns: usize,
    format: Format,
    codes: &'a [u8],
    steps: &'a Steps,
}

impl Packed {
    /// Stores `[rows, columns]` values, which must be finite.
    ///
    /// # Panics
    /// Where the values are no whole rows of at least one column.
    #[must_use]
    pub fn new(format: Format, values: &[f32], columns: usize) -> Self {
        assert!(
            columns > 0 && values.len().is_multiple_of(columns),
            "{} values in rows of {columns}",
            values.len()
        );
        let rows = values.len() / columns;
        let mut codes = Vec::with_capacity(rows * format.row_bytes(columns));
        let mut scales = Vec::new();
        for row in values.chunks_exact(columns) {
            match format {
                Format::F32 => codes.extend(row.iter().flat_map(|value| value.to_le_bytes())),
                Format::Bf16 => codes::write_bf16(row, &mut codes),
                Format::Int8 => scales.push(codes::write_int8(row, &mut codes)),
                Format::Nf4 => {
                    for block in row.chunks(BLOCK) {
                        scales.push(nf4::write(block, &mut codes));
                    }
                }
            }
        }
        let steps = match format {
            Format::F32 | Format::Bf16 => Steps::None,
            Format::Int8 => Steps::Rows(scales),
            Format::Nf4 => Steps::Blocks(Scales::new(&scales)),
        };
        Self {
            rows,
            columns,
            format,
            codes,
            steps,
        }
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values of a row.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes of codes and scales.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let scales = match &self.steps {
            Steps::None => 0,
            Steps::Rows(scales) => size_of_val(scales.as_slice()),
            Steps::Blocks(scales) => scales.bytes(),
        };
        self.codes_len() + scales
    }

    /// Bytes of codes alone.
    #[must_use]
    pub fn codes_len(&self) -> usize {
        self.rows * self.format.row_bytes(self.columns)
    }

    /// Takes the codes out, to be kept elsewhere and given to [`Self::with_codes`].
    pub fn take_codes(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.codes)
    }

    /// The matrix, whose codes must not have been taken.
    #[must_use]
    pub fn matrix(&self) -> Matrix<'_> {
        self.with_codes(&self.codes)
    }

    /// The matrix with codes that were taken.
    ///
    /// # Panics
    /// Where there are not [`Self::codes_len`] of them.
    #[must_use]
    pub fn with_codes<'a>(&'a self, codes: &'a [u8]) -> Matrix<'a> {
        assert!(codes.len() == self.codes_len(), "{} codes", codes.len());
        Matrix {
            first: 0,
            rows: self.rows,
            columns: self.columns,
            format: self.format,
            codes,
            steps: &self.steps,
        }
    }
}

impl Matrix<'_> {
    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values of a row.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Rows `first .. first + rows` of this matrix.
    ///
    /// # Panics
    /// Where the matrix has fewer.
    #[must_use]
    pub fn slice(self, first: usize, rows: usize) -> Self {
        let bytes = self.format.row_bytes(self.columns);
        Self {
            first: self.first + first,
            rows,
            codes: &self.codes[first * bytes..(first + rows) * bytes],
            ..self
        }
    }

    /// Writes the values of all rows.
    ///
    /// # Panics
    /// Where `out` has another size.
    pub fn decode(&self, out: &mut [f32]) {
        assert!(
            out.len() == self.rows * self.columns,
            "{} values",
            out.len()
        );
        if out.is_empty() {
            return;
        }
        let codes = self.codes.chunks_exact(self.format.row_bytes(self.columns));
        let rows = codes.zip(out.chunks_exact_mut(self.columns));
        for (row, (codes, out)) in (self.first..).zip(rows) {
            match &self.steps {
                Steps::None if self.format == Format::F32 => codes::read_f32(codes, out),
                Steps::None => codes::read_bf16(codes, out),
                Steps::Rows(scales) => codes::read_int8(codes, scales[row], out),
                Steps::Blocks(scales) => nf4::read(codes, scales, row, out),
            }
        }
    }
}
