//! Content on the wire: bounded in memory and in patience, and nothing of a bad chunk is written.

use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::{CHUNK, Pair, impatient, noise, quiet};
use crate::quic::chunk::{HEADER, Packer, Stride};
use crate::quic::{LinkError, Pace, PeerError, Stream, receive_content, send_content};
use crate::{RejectCode, limits};

/// Writes into shared memory, so that a test sees what arrived before an error.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn chunk(raw: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    Packer::new(Stride::BYTES).unwrap().pack(raw, &mut out);
    out
}

/// Sends `bytes` as they are; gives what was written and how it ended.
async fn receive_raw(pair: &Pair, bytes: &[u8], total: u64) -> (Vec<u8>, LinkError) {
    let mut near = pair.near.open().await.unwrap();
    let writer = Shared::default();
    let send = async {
        // Fails when the receiver has seen enough.
        let _ = near.send.write_all(bytes).await;
        near.finish();
    };
    let receive = async {
        let mut far = pair.far.accept().await.unwrap();
        let pace = Pace::default();
        receive_content(&mut far, writer.clone(), 0..total, &pace, &mut quiet).await
    };
    let ((), received) = tokio::join!(send, receive);
    let error = received.err().expect("bad chunk accepted");
    let written = writer.0.lock().unwrap().clone();
    (written, error)
}

#[tokio::test]
async fn a_bad_chunk_is_refused_and_nothing_of_it_is_written() {
    let pair = Pair::new().await;
    let (first, second) = (
        noise(limits::CHUNK),
        b"regular".repeat(limits::CHUNK / 7 + 1),
    );
    let second = &second[..limits::CHUNK];
    let total = 2 * CHUNK;
    let good = [chunk(&first), chunk(second)].concat();
    let at = HEADER + first.len();
    let changed = |offset: usize| {
        let mut bytes = good.clone();
        bytes[at + offset] ^= 0x10;
        bytes
    };
    let cases = [
        (changed(0), RejectCode::Malformed, "raw length"),
        (changed(4), RejectCode::Malformed, "packed length"),
        (changed(8), RejectCode::Malformed, "stride"),
        (changed(9), RejectCode::Malformed, "digest"),
        (changed(HEADER), RejectCode::Malformed, "packed bytes"),
        (
            good[..good.len() - 1].to_vec(),
            RejectCode::TimedOut,
            "cut in the body",
        ),
        (
            good[..at + 10].to_vec(),
            RejectCode::TimedOut,
            "cut in the header",
        ),
        (
            good[..at].to_vec(),
            RejectCode::TimedOut,
            "cut between chunks",
        ),
        (
            [chunk(&first), chunk(&noise(100))].concat(),
            RejectCode::Malformed,
            "tiny chunk",
        ),
    ];
    for (bytes, code, case) in cases {
        let (written, error) = receive_raw(&pair, &bytes, total).await;
        assert!(matches!(error, LinkError::Peer(_)), "{case}: {error:?}");
        assert_eq!(error.code(), code, "{case}: {error:?}");
        assert!(
            written == first,
            "{case}: {} bytes were written",
            written.len()
        );
    }
    let (written, error) = receive_raw(&pair, &good, total - 1).await;
    assert_eq!(
        error.code(),
        RejectCode::Malformed,
        "more than announced: {error:?}"
    );
    assert!(written == first);
    let (written, error) = receive_raw(&pair, &[&good[..], b"x"].concat(), total).await;
    assert!(
        matches!(error, LinkError::Peer(PeerError::Trailing)),
        "{error:?}"
    );
    assert_eq!(written.len() as u64, total);
}

/// Bytes read at one end and not yet written at the other.
#[derive(Clone, Default)]
struct Flight {
    read: Arc<AtomicU64>,
    written: Arc<AtomicU64>,
    most: Arc<AtomicU64>,
    longest_write: Arc<AtomicU64>,
}

impl Read for Flight {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        out.copy_from_slice(&noise(out.len()));
        let length = out.len() as u64;
        let read = self.read.fetch_add(length, Ordering::SeqCst) + length;
        let flying = read - self.written.load(Ordering::SeqCst);
        self.most.fetch_max(flying, Ordering::SeqCst);
        Ok(out.len())
    }
}

impl Seek for Flight {
    fn seek(&mut self, _: SeekFrom) -> std::io::Result<u64> {
        Ok(0)
    }
}

impl Write for Flight {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let length = bytes.len() as u64;
        self.longest_write.fetch_max(length, Ordering::SeqCst);
        self.written.fetch_add(length, Ordering::SeqCst);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn memory_is_bounded_by_windows_and_one_chunk_at_each_end() {
    let pair = Pair::new().await;
    let total = 64 << 20;
    let flight = Flight::default();
    let (mut near, mut far) = pair.stream(b"!").await;
    far.recv.read_exact(&mut [0]).await.unwrap();
    let pace = Pace::default();
    let (sent, received) = tokio::join!(
        async {
            send_content(
                &mut near,
                flight.clone(),
                0..total,
                Stride::BYTES,
                &pace,
                &mut quiet,
            )
            .await
        },
        async { receive_content(&mut far, flight.clone(), 0..total, &pace, &mut quiet).await }
    );
    sent.unwrap();
    received.unwrap();
    assert_eq!(flight.written.load(Ordering::SeqCst), total);
    assert_eq!(flight.longest_write.load(Ordering::SeqCst), CHUNK);
    // Send window 8 MiB, stream window 4 MiB.
    let most = flight.most.load(Ordering::SeqCst);
    assert!(most <= (12 << 20) + 2 * CHUNK, "{most} bytes in flight");
}

async fn receive_impatiently(mut far: Stream) -> LinkError {
    let pace = impatient();
    receive_content(&mut far, std::io::sink(), 0..CHUNK, &pace, &mut quiet)
        .await
        .err()
        .unwrap()
}

#[tokio::test]
async fn a_sender_that_stops_is_cut_between_and_within_chunks() {
    let pair = Pair::new().await;
    let bytes = chunk(&noise(limits::CHUNK));
    for (sent, expected) in [(HEADER - 1, "sent no chunk"), (HEADER + 100, "moved")] {
        let (_near, far) = pair.stream(&bytes[..sent]).await;
        let error = receive_impatiently(far).await;
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(error.code(), RejectCode::TimedOut);
    }
    // A receiver that never reads.
    let (mut near, far) = pair.stream(b"!").await;
    let reader = Flight::default();
    let pace = impatient();
    let error = send_content(
        &mut near,
        reader,
        0..64 * CHUNK,
        Stride::BYTES,
        &pace,
        &mut quiet,
    )
    .await
    .unwrap_err();
    assert!(
        matches!(error, LinkError::Peer(PeerError::TooSlow { .. })),
        "{error:?}"
    );
    drop(far);
}
