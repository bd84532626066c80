//! Records from Parquet files: columns by the names of the three shapes, a few hundred rows at a time.

use std::fs::File;
use std::io;
use std::ops::Range;

use parquet::basic::{ConvertedType, LogicalType, Type as Physical};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::ColumnDescriptor;

use super::read::{Place, Refused};
use super::shape::{FIELDS, Field, Fields, Row, Shape, Turn};

/// Rows that are decoded at once.
const BATCH: usize = 256;

/// Records of one Parquet file.
pub(super) struct Table {
    file: SerializedFileReader<File>,
    shape: Shape,
    columns: Vec<Column>,
    group: usize,
    open: Option<Group>,
    ready: std::vec::IntoIter<Fields>,
    /// Rows handed out.
    rows: u64,
    failed: bool,
}

/// Columns of a row group that is being read.
struct Group {
    readers: Vec<ColumnReaderImpl<ByteArrayType>>,
    left: usize,
}

/// One leaf column.
#[derive(Debug, Clone, Copy)]
struct Column {
    /// Place among the file's leaf columns.
    leaf: usize,
    /// Place among [`FIELDS`].
    field: usize,
    kind: Kind,
    max_def: i16,
    /// Definition level from which a list has an element.
    element_def: i16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Role,
    Content,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table")
            .field("shape", &self.shape)
            .field("rows", &self.rows)
            .finish_non_exhaustive()
    }
}

impl Table {
    /// Reads the footer and finds the columns.
    pub(super) fn open(file: File) -> Result<Self, Refused> {
        let file = SerializedFileReader::new(file).map_err(refused)?;
        let schema = file.metadata().file_metadata().schema_descr();
        let leaves = || (0..).zip(schema.columns());
        let shape = Shape::of(|name| {
            leaves().any(|(_, leaf)| leaf.path().parts().first().is_some_and(|root| root == name))
        })
        .map_err(|reason| Refused::Table(reason.replace("field", "column")))?;
        let wanted: &[usize] = match shape {
            Shape::Text => &[0],
            Shape::Pair => &[1, 2],
            Shape::Messages => &[3],
            Shape::Target => &[4, 5],
        };
        let mut columns = Vec::new();
        for &field in wanted {
            for (leaf, descriptor) in leaves() {
                if descriptor.path().parts().first().map(String::as_str) == Some(FIELDS[field]) {
                    columns.extend(column(leaf, field, descriptor)?);
                }
            }
            check(field, shape, &columns)?;
        }
        Ok(Self {
            file,
            shape,
            columns,
            group: 0,
            open: None,
            ready: Vec::new().into_iter(),
            rows: 0,
            failed: false,
        })
    }

    /// The next record, and where it stands. After an error that is not about one record there are no more.
    pub(super) fn next_row(&mut self) -> Option<Result<(Place, Row), Refused>> {
        if self.failed {
            return None;
        }
        loop {
            if let Some(fields) = self.ready.next() {
                self.rows += 1;
                let place = Place::Row(self.rows);
                return Some(match fields.row(self.shape) {
                    Ok(row) => Ok((place, row)),
                    Err(reason) => Err(Refused::Row(place, reason)),
                });
            }
            match self.fill() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    self.failed = true;
                    return Some(Err(error));
                }
            }
        }
    }

    /// Decodes the next rows; false at the end.
    fn fill(&mut self) -> Result<bool, Refused> {
        while self.open.as_ref().is_none_or(|group| group.left == 0) {
            if self.group >= self.file.num_row_groups() {
                return Ok(false);
            }
            self.open = Some(self.open_group(self.group)?);
            self.group += 1;
        }
        let Some(group) = &mut self.open else {
            return Ok(false);
        };
        let count = group.left.min(BATCH);
        let mut rows = vec![Fields::default(); count];
        for (column, reader) in self.columns.iter().zip(&mut group.readers) {
            let cells = read(column, reader, count)?;
            for (row, cell) in rows.iter_mut().zip(cells) {
                let cell = cell.map_err(|reason| {
                    Refused::Table(format!("column `{}`: {reason}", FIELDS[column.field]))
                })?;
                put(row, column, cell);
            }
        }
        group.left -= count;
        self.ready = rows.into_iter();
        Ok(true)
    }

    fn open_group(&self, index: usize) -> Result<Group, Refused> {
        let group = self.file.get_row_group(index).map_err(refused)?;
        let left = usize::try_from(group.metadata().num_rows())
            .map_err(|_| Refused::Table(format!("row group {index} has a negative size")))?;
        let readers = self
            .columns
            .iter()
            .map(
                |column| match group.get_column_reader(column.leaf).map_err(refused)? {
                    ColumnReader::ByteArrayColumnReader(reader) => Ok(reader),
                    _ => Err(Refused::Table("a column of text is of another type".into())),
                },
            )
            .collect::<Result<_, _>>()?;
        Ok(Group { readers, left })
    }
}

/// The library's words are about pages and levels, never about values.
fn refused(error: ParquetError) -> Refused {
    match error {
        ParquetError::External(cause) => match cause.downcast::<io::Error>() {
            Ok(error) => Refused::File(*error),
            Err(_) => damaged("unreadable"),
        },
        ParquetError::EOF(_) => damaged("it ends too early"),
        ParquetError::NYI(text) => Refused::Table(format!("not supported: {text}")),
        _ => damaged("footer or pages do not fit together"),
    }
}

fn damaged(what: &str) -> Refused {
    Refused::Table(format!(
        "not a whole Parquet file: {what}; copy or export it again"
    ))
}

/// What a leaf column is for; none for parts of messages that are not looked at.
fn column(leaf: usize, field: usize, of: &ColumnDescriptor) -> Result<Option<Column>, Refused> {
    let name = FIELDS[field];
    let parts = of.path().parts();
    let kind = match (
        parts.len(),
        of.max_rep_level(),
        parts.last().map(String::as_str),
    ) {
        (1, 0, _) => Kind::Text,
        // A list has one or two levels of its own between its name and its elements' fields.
        (3..=4, 1, Some("role")) => Kind::Role,
        (3..=4, 1, Some("content")) => Kind::Content,
        (3.., _, _) => return Ok(None),
        _ => {
            return Err(Refused::Table(format!(
                "column `{name}` is neither text nor a list of `role` and `content`; export it as one of them"
            )));
        }
    };
    let is_text = of.physical_type() == Physical::BYTE_ARRAY
        && !matches!(of.logical_type_ref(), Some(logical) if *logical != LogicalType::String)
        && matches!(
            of.converted_type(),
            ConvertedType::NONE | ConvertedType::UTF8
        );
    if !is_text {
        return Err(Refused::Table(format!(
            "column `{}` is {} ({}), expected text (UTF-8)",
            parts.join("."),
            of.physical_type(),
            of.converted_type(),
        )));
    }
    Ok(Some(Column {
        leaf,
        field,
        kind,
        max_def: of.max_def_level(),
        element_def: of.repeated_ancestor_def_level(),
    }))
}

/// A column of messages needs both leaves; those of one record are matched by their place.
fn check(field: usize, shape: Shape, columns: &[Column]) -> Result<(), Refused> {
    let kinds: Vec<Kind> = columns
        .iter()
        .filter(|column| column.field == field)
        .map(|column| column.kind)
        .collect();
    let name = FIELDS[field];
    let optional = name == "prompt" || name == "context";
    match kinds.as_slice() {
        [] if optional => Ok(()),
        [Kind::Text] if shape != Shape::Messages => Ok(()),
        [Kind::Role, Kind::Content] | [Kind::Content, Kind::Role] => Ok(()),
        _ => Err(Refused::Table(format!(
            "column `{name}` has not the parts of {shape}: text, or a list of `role` and `content`"
        ))),
    }
}

/// The values of one record in one column, none for null.
type Cell = Vec<Option<String>>;

/// Reads whole records of one column.
fn read(
    column: &Column,
    reader: &mut ColumnReaderImpl<ByteArrayType>,
    count: usize,
) -> Result<Vec<Result<Cell, String>>, Refused> {
    let (mut defs, mut reps, mut values) = (Vec::new(), Vec::new(), Vec::new());
    let mut records = 0;
    while records < count {
        let left = count - records;
        let (read, _, _) = reader
            .read_records(left, Some(&mut defs), Some(&mut reps), &mut values)
            .map_err(refused)?;
        if read == 0 {
            return Err(damaged("a column has fewer rows than its group"));
        }
        records += read;
    }
    if column.max_def == 0 {
        return Ok(values
            .iter()
            .map(|value| Ok(vec![Some(text(value)?)]))
            .collect());
    }
    let mut values = values.iter();
    let mut cells = Vec::with_capacity(count);
    for record in records_of(&defs, &reps) {
        let mut cell = Ok(Vec::new());
        for &def in defs.get(record).unwrap_or_default() {
            let value = if def == column.max_def {
                let Some(value) = values.next() else {
                    return Err(damaged("fewer values than levels"));
                };
                Some(text(value))
            } else if column.kind == Kind::Text || def >= column.element_def {
                None
            } else {
                continue;
            };
            if let Ok(all) = &mut cell {
                match value.transpose() {
                    Ok(value) => all.push(value),
                    Err(reason) => cell = Err(reason),
                }
            }
        }
        cells.push(cell);
    }
    if cells.len() != count {
        return Err(damaged("levels do not make up the rows of the group"));
    }
    Ok(cells)
}

/// Levels of each record: one begins where the repetition level is zero. Without lists every level is a record.
fn records_of(defs: &[i16], reps: &[i16]) -> Vec<Range<usize>> {
    if reps.is_empty() {
        return (0..defs.len()).map(|at| at..at + 1).collect();
    }
    let mut records: Vec<Range<usize>> = Vec::new();
    for (at, &rep) in reps.iter().enumerate() {
        match records.last_mut() {
            Some(record) if rep > 0 => record.end = at + 1,
            _ => records.push(at..at + 1),
        }
    }
    records
}

fn text(value: &ByteArray) -> Result<String, String> {
    value
        .as_utf8()
        .map(str::to_owned)
        .map_err(|_| "a value is not UTF-8; export the table again".to_owned())
}

/// Puts the values of a record into its field.
fn put(row: &mut Fields, column: &Column, cell: Cell) {
    let Some(field) = row.0.get_mut(column.field) else {
        return;
    };
    if column.kind == Kind::Text {
        *field = cell
            .into_iter()
            .next()
            .flatten()
            .map_or(Field::Absent, Field::Text);
        return;
    }
    if *field == Field::Absent {
        *field = Field::Turns(vec![Turn::default(); cell.len()]);
    }
    if let Field::Turns(turns) = field {
        for (turn, value) in turns.iter_mut().zip(cell) {
            match column.kind {
                Kind::Role => turn.role = value,
                Kind::Text | Kind::Content => turn.content = value,
            }
        }
    }
}
