//! Frames on a stream: what is wrong is refused by name, and the connection goes on.

use std::time::Duration;

use super::Pair;
use crate::codec::{self, CodecError};
use crate::frame::{FrameError, FrameHeader, HEADER};
use crate::ids::{ConsortiumId, Digest, InstitutionId};
use crate::message::{Content, Download, Hello, Message as _, Ready, Welcome};
use crate::quic::{LinkError, PeerError, Request, Wait};
use crate::{RejectCode, limits};

fn hello() -> Hello {
    Hello {
        version: 1,
        software: "consilium 0.1".to_owned(),
        consortium: ConsortiumId::new("demo").unwrap(),
        institution: InstitutionId::new("st-anna").unwrap(),
        capacity: 1,
        log_size: 7,
    }
}

fn frame(kind: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = FrameHeader::new(kind, body).to_bytes().to_vec();
    bytes.extend_from_slice(body);
    bytes
}

fn ready() -> Vec<u8> {
    let body = codec::encode(&Ready { offset: 5 }).unwrap();
    frame(Ready::KIND, &body)
}

#[tokio::test]
async fn messages_arrive_as_they_were_sent_in_both_directions() {
    let pair = Pair::new().await;
    let mut near = pair.near.open().await.unwrap();
    near.send(&hello()).await.unwrap();
    let mut far = pair.far.accept().await.unwrap();
    assert_eq!(far.request().await.unwrap(), Request::Hello(hello()));
    for length in 0..50 {
        far.send(&Content { length }).await.unwrap();
    }
    for length in 0..50 {
        let content = near.expect::<Content>(Wait::Connected).await.unwrap();
        assert_eq!(content.length, length);
    }
}

#[tokio::test]
async fn a_refusal_arrives_as_its_code_and_stops_the_sender() {
    let pair = Pair::new().await;
    let mut near = pair.near.open().await.unwrap();
    near.send(&hello()).await.unwrap();
    let mut far = pair.far.accept().await.unwrap();
    far.request().await.unwrap();
    far.reject(RejectCode::NotMember).await.unwrap();
    let error = near.expect::<Welcome>(Wait::Due).await.unwrap_err();
    assert_eq!(error.rejection(), Some(RejectCode::NotMember));
    let sending = async {
        loop {
            near.send(&hello()).await?;
        }
    };
    let stopped: Result<(), LinkError> = sending.await;
    assert_eq!(
        stopped.unwrap_err().rejection(),
        Some(RejectCode::NotMember)
    );
}

#[tokio::test]
async fn every_bad_frame_is_named_and_the_connection_survives() {
    let pair = Pair::new().await;
    let changed = |at: usize, byte: u8| {
        let mut bytes = ready();
        bytes[at] = byte;
        bytes
    };
    let mut long = ready();
    long[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    let cases = [
        (changed(0, b'X'), PeerError::Frame(FrameError::Magic)),
        (changed(4, 9), PeerError::Frame(FrameError::Version(9))),
        (
            changed(6, 99),
            PeerError::Frame(FrameError::Kind {
                got: 99,
                expected: Ready::KIND,
            }),
        ),
        (
            long,
            PeerError::Frame(FrameError::TooLong {
                length: u32::MAX as usize,
                limit: limits::FRAME,
            }),
        ),
        (
            frame(Ready::KIND, &[0; 65]),
            PeerError::Frame(FrameError::TooLong {
                length: 65,
                limit: 64,
            }),
        ),
        (changed(20, 0xaa), PeerError::Frame(FrameError::Digest)),
        (changed(HEADER, 0xaa), PeerError::Frame(FrameError::Digest)),
        (
            frame(Ready::KIND, &[0; 9]),
            PeerError::Message(CodecError::Trailing(1)),
        ),
        (
            ready()[..HEADER + 3].to_vec(),
            PeerError::Ended("frame body"),
        ),
        (ready()[..10].to_vec(), PeerError::Ended("frame header")),
    ];
    for (bytes, expected) in cases {
        let (mut near, mut far) = pair.stream(&bytes).await;
        near.finish();
        let error = far.expect::<Ready>(Wait::Due).await.unwrap_err();
        assert_eq!(error.to_string(), expected.to_string());
        assert!(matches!(error, LinkError::Peer(_)), "{error:?}");
    }
    let (_near, mut far) = pair.stream(&ready()).await;
    assert_eq!(far.expect::<Ready>(Wait::Due).await.unwrap().offset, 5);
}

#[tokio::test]
async fn a_body_longer_than_its_kind_is_refused_before_it_comes() {
    let pair = Pair::new().await;
    let header = FrameHeader {
        kind: Ready::KIND,
        length: limits::FRAME,
        digest: Digest::of(b""),
    };
    let (_near, mut far) = pair.stream(&header.to_bytes()).await;
    let error = far.expect::<Ready>(Wait::Due).await.unwrap_err();
    assert_eq!(error.code(), RejectCode::TooLarge, "{error:?}");
}

#[tokio::test]
async fn a_reply_may_not_open_a_stream() {
    let pair = Pair::new().await;
    let (_near, mut far) = pair.stream(&ready()).await;
    let error = far.request().await.unwrap_err();
    assert_eq!(error.code(), RejectCode::Malformed, "{error:?}");
}

#[tokio::test]
async fn a_silent_peer_is_not_waited_for() {
    let pair = Pair::new().await;
    let (near, mut far) = pair.stream(&ready()).await;
    far.expect::<Ready>(Wait::Due).await.unwrap();
    let wait = Wait::Within(Duration::from_millis(20));
    let error = far.expect::<Ready>(wait).await.unwrap_err();
    assert_eq!(error.code(), RejectCode::TimedOut, "{error:?}");
    assert!(error.is_retryable());
    drop(near);
}

#[tokio::test]
async fn an_abandoned_stream_says_why_to_both_ends_of_it() {
    let pair = Pair::new().await;
    let request = Download {
        digest: Digest::of(b"x"),
        offset: 0,
    };
    let mut near = pair.near.open().await.unwrap();
    near.send(&request).await.unwrap();
    let mut far = pair.far.accept().await.unwrap();
    assert_eq!(far.request().await.unwrap(), Request::Download(request));
    far.abandon(RejectCode::Storage);
    let error = near.expect::<Content>(Wait::Due).await.unwrap_err();
    assert_eq!(error.rejection(), Some(RejectCode::Storage), "{error:?}");
}
