//! What chunks cost over a bare stream of the same connection.

use std::io::{Cursor, sink};
use std::sync::Arc;

use tokio::time::Instant;

use super::{Pair, noise, quiet};
use crate::quic::chunk::Stride;
use crate::quic::{Pace, receive_content, send_content};

const LENGTH: usize = 128 << 20;

/// A shared buffer that can be read from any place.
#[derive(Clone)]
struct Shared(Arc<Vec<u8>>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures; run with --release and --nocapture"]
async fn megabytes_per_second_bare_and_in_chunks() {
    let floats: Vec<u8> = noise(LENGTH / 2)
        .chunks_exact(2)
        .flat_map(|pair| {
            let value = f32::from(i16::from_le_bytes([pair[0], pair[1]])) / 1e6;
            (value * 1.000_123).to_le_bytes()
        })
        .collect();
    let records: Vec<u8> = noise(LENGTH)
        .iter()
        .enumerate()
        .map(|(at, byte)| u8::try_from(at % 32 * 7).unwrap() + byte % 16)
        .collect();
    let pair = Pair::new().await;
    for _ in 0..2 {
        let rate = bare(&pair, &floats).await;
        println!("bare stream: {rate:.0} MB/s");
        for (name, content, stride) in [
            ("floats", &floats, Stride::FLOATS),
            ("records", &records, Stride::BYTES),
            ("noise", &noise(LENGTH), Stride::BYTES),
        ] {
            let rate = chunked(&pair, Shared(Arc::new(content.clone())), stride).await;
            println!("{name} in chunks: {rate:.0} MB/s");
        }
    }
}

async fn bare(pair: &Pair, content: &[u8]) -> f64 {
    let (mut near, mut far) = pair.stream(b"!").await;
    far.recv.read_exact(&mut [0]).await.unwrap();
    let begun = Instant::now();
    let send = async {
        near.send.write_all(content).await.unwrap();
        near.finish();
    };
    let receive = async { while far.recv.read_chunk(1 << 20, true).await.unwrap().is_some() {} };
    tokio::join!(send, receive);
    rate(content.len(), begun)
}

async fn chunked(pair: &Pair, content: Shared, stride: Stride) -> f64 {
    let (mut near, mut far) = pair.stream(b"!").await;
    far.recv.read_exact(&mut [0]).await.unwrap();
    let (length, pace) = (content.0.len(), Pace::default());
    let all = 0..length as u64;
    let begun = Instant::now();
    let (mut first, mut second) = (quiet, quiet);
    let reader = Cursor::new(content);
    let (sent, received) = tokio::join!(
        send_content(&mut near, reader, all.clone(), stride, &pace, &mut first),
        receive_content(&mut far, sink(), all, &pace, &mut second)
    );
    sent.unwrap();
    received.unwrap();
    rate(length, begun)
}

fn rate(bytes: usize, begun: Instant) -> f64 {
    bytes as f64 / 1e6 / begun.elapsed().as_secs_f64()
}
