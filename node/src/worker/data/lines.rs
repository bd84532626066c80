//! Lines of a file of any size, with bounded memory.

use std::io::{self, BufRead, Read as _};

/// Longest line, in bytes. A longer one is a mistake (a file without line ends, say) and is not kept in memory.
pub(super) const LONGEST: usize = 16 << 20;

/// Bytes that are read at a time, and that a line may take beyond the longest one before it is dropped.
const PIECE: u64 = 64 << 10;

/// What the reader found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// A line, without its end.
    Whole,
    /// A line of more than [`LONGEST`] bytes: this many. Its text was dropped.
    TooLong(u64),
    /// The file has ended.
    End,
}

/// Reads the next line into `line`, which is cleared first.
pub(super) fn next_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<Line> {
    line.clear();
    let mut bytes = 0_u64;
    loop {
        if bytes > LONGEST as u64 {
            line.clear();
        }
        let read = (&mut *reader).take(PIECE).read_until(b'\n', line)?;
        let ended = line.last() == Some(&b'\n');
        if ended {
            line.pop();
        }
        if read == 0 && bytes == 0 {
            return Ok(Line::End);
        }
        // A newline alone is a line of no bytes, and not the end.
        bytes += read as u64 - u64::from(ended);
        if !ended && read > 0 {
            continue;
        }
        if bytes > LONGEST as u64 {
            line.clear();
            line.shrink_to(LONGEST >> 4);
            return Ok(Line::TooLong(bytes));
        }
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        return Ok(Line::Whole);
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use super::*;

    #[test]
    fn lines_come_whole_whatever_the_buffer_and_a_huge_one_is_measured_and_dropped() {
        let text = "ab\n\r\n\ncd\r\nlast";
        for capacity in [1, 2, 3, 64] {
            let mut reader = BufReader::with_capacity(capacity, text.as_bytes());
            let mut line = Vec::new();
            let mut lines = Vec::new();
            while next_line(&mut reader, &mut line).unwrap() == Line::Whole {
                lines.push(String::from_utf8(line.clone()).unwrap());
            }
            assert_eq!(lines, ["ab", "", "", "cd", "last"], "{capacity}");
        }
        let long = LONGEST as u64 + 7;
        let bytes = io::repeat(b'x').take(long).chain(&b"\nnext\n"[..]);
        let mut reader = BufReader::new(bytes);
        let mut line = Vec::new();
        assert_eq!(
            next_line(&mut reader, &mut line).unwrap(),
            Line::TooLong(long)
        );
        assert!(line.capacity() < LONGEST);
        assert_eq!(next_line(&mut reader, &mut line).unwrap(), Line::Whole);
        assert_eq!(line, b"next");
    }
}
