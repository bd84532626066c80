//! Content of artefacts on a stream, chunk by chunk. Memory is one chunk, whatever the content's length.
//!
//! Reading, hashing and packing run on the blocking pool, one chunk at a time; the windows of the connection keep the
//! network busy meanwhile. A receiver writes a chunk after its digest was checked, and nothing of one that fails.

use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::pin::pin;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::chunk::{ChunkHeader, HEADER, Packer, Stride, Unpacker};
use super::error::{LinkError, LocalError, PeerError};
use super::frame::{DEADLINE, Stream};
use crate::limits;

/// Called with the position in the content, after each chunk.
pub type Progress<'a> = &'a mut (dyn FnMut(u64) + Send);

/// How slow a peer may be. A transfer that moves at this pace may take forever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Until the next chunk has begun and its header is complete.
    pub header: Duration,
    /// Stretch of waiting for the peer over which the pace is averaged; time spent on our own disk does not count.
    pub window: Duration,
    /// Bytes that must move within one window.
    pub floor: u64,
    /// Until the peer has answered a request, or has checked and stored an artefact.
    pub answer: Duration,
}

impl Default for Pace {
    /// 10 s for a header, 32 KiB/s averaged over 30 s, 10 minutes for an answer.
    fn default() -> Self {
        Self {
            header: DEADLINE,
            window: Duration::from_secs(30),
            floor: 30 * 32 * 1024,
            answer: Duration::from_secs(600),
        }
    }
}

/// Sends bytes `part` of what `reader` has, and ends our direction of the stream.
///
/// # Errors
/// The content is shorter than `part`, the peer stopped the stream or takes too little, or the connection is lost.
pub async fn send_content<R: Read + Seek + Send + 'static>(
    stream: &mut Stream,
    reader: R,
    part: Range<u64>,
    stride: Stride,
    pace: &Pace,
    progress: Progress<'_>,
) -> Result<(), LinkError> {
    let start = part.start;
    let mut source = blocking(move || Source::new(reader, start, stride)).await??;
    let mut meter = Meter::new(*pace);
    let mut position = part.start;
    while position < part.end {
        let length = chunk_length(part.end - position);
        source = blocking(move || source.next(length)).await??;
        let mut rest = source.packed.as_slice();
        while !rest.is_empty() {
            let write = async { Ok(stream.send.write(rest).await?) };
            let written = meter.step(write).await?;
            rest = rest.get(written..).unwrap_or_default();
        }
        position = position.saturating_add(to_u64(length));
        progress(position);
    }
    stream.finish();
    Ok(())
}

/// Receives bytes `part` of a content into `writer`, and checks that the peer's direction ends there. Gives the writer
/// back. The digest of the whole is for the caller to check.
///
/// # Errors
/// A chunk is malformed or damaged, the content is shorter or longer than `part`, the peer is too slow, the connection is
/// lost, or `writer` fails. The chunks before were written.
pub async fn receive_content<W: Write + Send + 'static>(
    stream: &mut Stream,
    writer: W,
    part: Range<u64>,
    pace: &Pace,
    progress: Progress<'_>,
) -> Result<W, LinkError> {
    let mut sink = blocking(move || Sink::new(writer)).await??;
    let mut meter = Meter::new(*pace);
    let mut position = part.start;
    while position < part.end {
        let mut header = [0; HEADER];
        meter.read_header(stream, &mut header).await?;
        let header = ChunkHeader::parse(&header, part.end - position).map_err(PeerError::Chunk)?;
        sink.packed.resize(header.packed_length(), 0);
        meter.read(stream, &mut sink.packed, "chunk").await?;
        sink = blocking(move || sink.accept(&header)).await??;
        position = position.saturating_add(to_u64(header.raw_length()));
        progress(position);
    }
    meter.read_end(stream).await?;
    Ok(sink.writer)
}

/// Runs `work` on the blocking pool. A panic there goes on here.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, LinkError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => LocalError::Stopped.into(),
        })
}

/// Sender's half of the work on the blocking pool.
struct Source<R> {
    reader: R,
    packer: Packer,
    raw: Vec<u8>,
    packed: Vec<u8>,
}

impl<R: Read + Seek> Source<R> {
    fn new(mut reader: R, start: u64, stride: Stride) -> Result<Self, LinkError> {
        reader
            .seek(SeekFrom::Start(start))
            .map_err(LocalError::Content)?;
        Ok(Self {
            reader,
            packer: Packer::new(stride).map_err(LocalError::Content)?,
            raw: Vec::new(),
            packed: Vec::new(),
        })
    }

    fn next(mut self, length: usize) -> Result<Self, LinkError> {
        self.raw.resize(length, 0);
        self.reader
            .read_exact(&mut self.raw)
            .map_err(LocalError::Content)?;
        self.packed.clear();
        self.packer.pack(&self.raw, &mut self.packed);
        Ok(self)
    }
}

/// Receiver's half of the work on the blocking pool.
struct Sink<W> {
    writer: W,
    unpacker: Unpacker,
    packed: Vec<u8>,
    raw: Vec<u8>,
}

impl<W: Write> Sink<W> {
    fn new(writer: W) -> Result<Self, LinkError> {
        Ok(Self {
            writer,
            unpacker: Unpacker::new().map_err(LocalError::Content)?,
            packed: Vec::new(),
            raw: Vec::new(),
        })
    }

    fn accept(mut self, header: &ChunkHeader) -> Result<Self, LinkError> {
        self.unpacker
            .unpack(header, &self.packed, &mut self.raw)
            .map_err(PeerError::Chunk)?;
        self.writer
            .write_all(&self.raw)
            .map_err(LocalError::Content)?;
        Ok(self)
    }
}

/// Measures how fast the peer moves while we wait for it.
#[derive(Debug)]
struct Meter {
    pace: Pace,
    waited: Duration,
    moved: u64,
}

impl Meter {
    const fn new(pace: Pace) -> Self {
        Self {
            pace,
            waited: Duration::ZERO,
            moved: 0,
        }
    }

    /// Waits for one read or write, which says how many bytes moved.
    async fn step(
        &mut self,
        step: impl Future<Output = Result<usize, LinkError>>,
    ) -> Result<usize, LinkError> {
        let mut step = pin!(step);
        loop {
            let started = Instant::now();
            let left = self.pace.window.saturating_sub(self.waited);
            let Ok(moved) = timeout(left, step.as_mut()).await else {
                self.count(left, 0)?;
                continue;
            };
            let moved = moved?;
            self.count(started.elapsed(), to_u64(moved))?;
            return Ok(moved);
        }
    }

    fn count(&mut self, waited: Duration, moved: u64) -> Result<(), PeerError> {
        self.waited = self.waited.saturating_add(waited);
        self.moved = self.moved.saturating_add(moved);
        if self.waited < self.pace.window {
            return Ok(());
        }
        if self.moved < self.pace.floor {
            return Err(PeerError::TooSlow {
                bytes: self.moved,
                floor: self.pace.floor,
                window: self.pace.window,
            });
        }
        *self = Self::new(self.pace);
        Ok(())
    }

    async fn read(
        &mut self,
        stream: &mut Stream,
        out: &mut [u8],
        what: &'static str,
    ) -> Result<(), LinkError> {
        let mut filled = 0;
        while let Some(rest) = out.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let read = async { Ok(stream.recv.read(rest).await?.unwrap_or(0)) };
            match self.step(read).await? {
                0 => return Err(PeerError::Ended(what).into()),
                read => filled += read,
            }
        }
        Ok(())
    }

    async fn read_header(
        &mut self,
        stream: &mut Stream,
        out: &mut [u8; HEADER],
    ) -> Result<(), LinkError> {
        let within = self.pace.header;
        timeout(within, self.read(stream, out, "chunk header"))
            .await
            .unwrap_or(Err(late(within)))
    }

    async fn read_end(&self, stream: &mut Stream) -> Result<(), LinkError> {
        let within = self.pace.header;
        match timeout(within, stream.recv.read(&mut [0])).await {
            Ok(Ok(None)) => Ok(()),
            Ok(Ok(Some(_))) => Err(PeerError::Trailing.into()),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(late(within)),
        }
    }
}

fn late(within: Duration) -> LinkError {
    PeerError::Late {
        what: "chunk",
        within,
    }
    .into()
}

fn chunk_length(remaining: u64) -> usize {
    usize::try_from(remaining).map_or(limits::CHUNK, |remaining| remaining.min(limits::CHUNK))
}

fn to_u64(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: Pace = Pace {
        header: Duration::from_secs(10),
        window: Duration::from_secs(30),
        floor: 3000,
        answer: Duration::from_secs(1),
    };

    async fn move_bytes(
        meter: &mut Meter,
        bytes: usize,
        after: Duration,
    ) -> Result<usize, LinkError> {
        let step = async {
            tokio::time::sleep(after).await;
            Ok(bytes)
        };
        meter.step(step).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_at_the_floor_is_never_cut() {
        let mut meter = Meter::new(PACE);
        for _ in 0..1000 {
            move_bytes(&mut meter, 1000, Duration::from_secs(10))
                .await
                .unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_byte_now_and_then_is_too_slow() {
        let mut meter = Meter::new(PACE);
        let mut bytes = 0;
        let error = loop {
            match move_bytes(&mut meter, 1, Duration::from_secs(9)).await {
                Ok(moved) => bytes += moved,
                Err(error) => break error,
            }
        };
        assert_eq!(bytes, 3);
        assert!(
            matches!(error, LinkError::Peer(PeerError::TooSlow { bytes: 3, .. })),
            "{error}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_stops_is_noticed_within_two_windows() {
        let mut meter = Meter::new(PACE);
        move_bytes(&mut meter, 1 << 20, Duration::from_secs(1))
            .await
            .unwrap();
        let begun = Instant::now();
        let error = meter.step(std::future::pending()).await.unwrap_err();
        assert!(matches!(
            error,
            LinkError::Peer(PeerError::TooSlow { bytes: 0, .. })
        ));
        assert!(
            begun.elapsed() <= Duration::from_secs(60),
            "{:?}",
            begun.elapsed()
        );
    }
}
