//! Messages as frames on a stream.

use std::time::Duration;

use tokio::time::timeout;

use super::error::{LinkError, LocalError, PeerError};
use crate::codec;
use crate::frame::{FrameError, FrameHeader, HEADER};
use crate::message::{Download, Hello, Message, Reject, Upload};
use crate::reject::RejectCode;

/// How long a frame may take once it is due.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// How long the first byte of a frame may take. The rest must follow within [`DEADLINE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// [`DEADLINE`]: it is the peer's turn.
    Due,
    /// As long as the peer's work takes.
    Within(Duration),
    /// As long as the connection lives, which the idle timeout bounds.
    Connected,
}

/// What a node may open a stream with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// The control stream.
    Hello(Hello),
    /// Hand over an artefact.
    Upload(Upload),
    /// Fetch an artefact.
    Download(Download),
}

/// A stream of both directions. Dropping it ends it.
#[derive(Debug)]
pub struct Stream {
    pub(super) send: quinn::SendStream,
    pub(super) recv: quinn::RecvStream,
}

impl Stream {
    pub(super) fn new((send, recv): (quinn::SendStream, quinn::RecvStream)) -> Self {
        Self { send, recv }
    }

    /// Sends one message.
    ///
    /// # Errors
    /// The peer stopped the stream or takes nothing, the connection is lost, or a field of the message is out of range.
    pub async fn send<T: Message>(&mut self, message: &T) -> Result<(), LinkError> {
        let body = codec::encode(message).map_err(LocalError::Message)?;
        let mut frame = FrameHeader::new(T::KIND, &body).to_bytes().to_vec();
        frame.extend_from_slice(&body);
        within(DEADLINE, "room for a frame", async {
            Ok(self.send.write_all(&frame).await?)
        })
        .await
    }

    /// Receives one message of the kind that may come now.
    ///
    /// # Errors
    /// [`LinkError::Rejected`] if the peer sent a [`Reject`] instead; else whatever is wrong with the frame.
    pub async fn expect<T: Message>(&mut self, wait: Wait) -> Result<T, LinkError> {
        let header = self.header(wait).await?;
        if header.kind == T::KIND {
            return self.body(&header).await;
        }
        if header.kind == Reject::KIND {
            return Err(LinkError::Rejected(
                self.body::<Reject>(&header).await?.code,
            ));
        }
        Err(unexpected(&header, T::KIND))
    }

    /// Receives the message that a node opens a stream with.
    ///
    /// # Errors
    /// Whatever is wrong with the frame.
    pub async fn request(&mut self) -> Result<Request, LinkError> {
        let header = self.header(Wait::Due).await?;
        match header.kind {
            Hello::KIND => self.body(&header).await.map(Request::Hello),
            Upload::KIND => self.body(&header).await.map(Request::Upload),
            Download::KIND => self.body(&header).await.map(Request::Download),
            _ => Err(unexpected(&header, Hello::KIND)),
        }
    }

    /// Refuses: stops what the peer sends, tells it the code, and ends the stream.
    ///
    /// # Errors
    /// The peer cannot be told any more.
    pub async fn reject(mut self, code: RejectCode) -> Result<(), LinkError> {
        // Already stopped or read to its end is as good.
        let _ = self.recv.stop(u32::from(code.number()).into());
        self.send(&Reject { code }).await?;
        self.finish();
        Ok(())
    }

    /// Ends our direction; what was sent still arrives.
    pub fn finish(&mut self) {
        // Fails only if it has ended before.
        let _ = self.send.finish();
    }

    /// Gives up both directions; the peer sees the code at its next read or write.
    pub fn abandon(mut self, code: RejectCode) {
        let number = u32::from(code.number()).into();
        // Both fail only if that direction has ended before.
        let _ = self.send.reset(number);
        let _ = self.recv.stop(number);
    }

    async fn header(&mut self, wait: Wait) -> Result<FrameHeader, LinkError> {
        let mut bytes = [0; HEADER];
        let (first, rest) = bytes.split_at_mut(1);
        let recv = &mut self.recv;
        let read_first = async {
            recv.read_exact(first)
                .await
                .map_err(LinkError::reading("frame"))
        };
        match wait {
            Wait::Due => within(DEADLINE, "frame", read_first).await?,
            Wait::Within(limit) => within(limit, "frame", read_first).await?,
            Wait::Connected => read_first.await?,
        }
        within(DEADLINE, "frame header", async {
            recv.read_exact(rest)
                .await
                .map_err(LinkError::reading("frame header"))
        })
        .await?;
        Ok(FrameHeader::parse(&bytes).map_err(PeerError::Frame)?)
    }

    async fn body<T: Message>(&mut self, header: &FrameHeader) -> Result<T, LinkError> {
        if header.length > T::LIMIT {
            return Err(PeerError::Frame(FrameError::TooLong {
                length: header.length,
                limit: T::LIMIT,
            })
            .into());
        }
        let mut body = vec![0; header.length];
        within(DEADLINE, "frame body", async {
            self.recv
                .read_exact(&mut body)
                .await
                .map_err(LinkError::reading("frame body"))
        })
        .await?;
        header.check(&body).map_err(PeerError::Frame)?;
        Ok(codec::decode(&body).map_err(PeerError::Message)?)
    }
}

fn unexpected(header: &FrameHeader, expected: u16) -> LinkError {
    PeerError::Frame(FrameError::Kind {
        got: header.kind,
        expected,
    })
    .into()
}

async fn within<T>(
    limit: Duration,
    what: &'static str,
    future: impl Future<Output = Result<T, LinkError>>,
) -> Result<T, LinkError> {
    timeout(limit, future).await.unwrap_or_else(|_| {
        Err(PeerError::Late {
            what,
            within: limit,
        }
        .into())
    })
}
