//! Uploads and downloads of whole files. Both are resumed where they broke off, and both ends check the digest.

use std::fs::File;
use std::io::Seek as _;
use std::io::SeekFrom;
use std::path::{Path, PathBuf};

use super::chunk::Stride;
use super::endpoint::Connection;
use super::error::{LinkError, LocalError, PeerError};
use super::frame::{Stream, Wait};
use super::partial::{Complete, Partial};
use super::transfer::{Pace, Progress, blocking, receive_content, send_content};
use crate::ids::Digest;
use crate::message::{Content, Download, Ready, Receipt, Upload};

/// Hands a file over and waits until it is stored and logged. The receiver says from where.
///
/// # Errors
/// The file has another length than `upload` says, the peer refuses, or the link breaks. A repeat continues.
pub async fn upload(
    connection: &Connection,
    upload: &Upload,
    file: &Path,
    stride: Stride,
    pace: &Pace,
    progress: Progress<'_>,
) -> Result<Receipt, LinkError> {
    let (content, length) = open(file).await?;
    if length != upload.length {
        return Err(LocalError::Length {
            path: file.to_owned(),
            got: length,
            expected: upload.length,
        }
        .into());
    }
    let mut stream = connection.open().await?;
    stream.send(upload).await?;
    let Ready { offset } = stream.expect(Wait::Within(pace.answer)).await?;
    if offset > length {
        return Err(PeerError::Offset { offset, length }.into());
    }
    send_content(&mut stream, content, offset..length, stride, pace, progress)
        .await
        .map_err(|error| error.in_file(file))?;
    stream.expect(Wait::Within(pace.answer)).await
}

/// Receives the content of an upload that was found admissible into `partial`, from where that file ends. The receipt, or
/// a [`Stream::reject`], is for the caller to send.
///
/// # Errors
/// The content is not what was announced, the peer is too slow, the link breaks, or the file system fails.
pub async fn receive_upload(
    stream: &mut Stream,
    upload: &Upload,
    partial: &Path,
    pace: &Pace,
    progress: Progress<'_>,
) -> Result<Complete, LinkError> {
    let (total, expected) = (upload.length, upload.statement.claim().artefact);
    let file = open_partial(partial, total).await?;
    let offset = file.length();
    stream.send(&Ready { offset }).await?;
    let file = receive_content(stream, file, offset..total, pace, progress)
        .await
        .map_err(|error| error.in_file(partial))?;
    blocking(move || file.complete(expected)).await?
}

/// Fetches an artefact of at most `limit` bytes into the file `into`, which appears only when its digest was checked.
/// What an interrupted download left at [`partial_path`] is used. Returns the length.
///
/// # Errors
/// The peer refuses or sends something else, the link breaks, or the file system fails. A repeat continues.
pub async fn download(
    connection: &Connection,
    digest: Digest,
    into: &Path,
    limit: u64,
    pace: &Pace,
    progress: Progress<'_>,
) -> Result<u64, LinkError> {
    let path = partial_path(into);
    let mut file = open_partial(&path, limit).await?;
    let (mut stream, length) = match ask(connection, digest, limit, &mut file, pace).await {
        Ok(asked) => asked,
        Err(error) => {
            if file.length() == 0 {
                file.discard()?;
            }
            return Err(error);
        }
    };
    let offset = file.length();
    let file = receive_content(&mut stream, file, offset..length, pace, progress)
        .await
        .map_err(|error| error.in_file(&path))?;
    let into = into.to_owned();
    blocking(move || {
        let complete = file.complete(digest)?;
        Ok::<_, LinkError>(complete.publish(&into)?)
    })
    .await??;
    Ok(length)
}

/// Answers a download with the rest of a file.
///
/// # Errors
/// The file cannot be read, the peer takes too little, or the link breaks. The peer was told.
pub async fn serve_download(
    mut stream: Stream,
    request: &Download,
    file: &Path,
    stride: Stride,
    pace: &Pace,
    progress: Progress<'_>,
) -> Result<(), LinkError> {
    let served = async {
        let (content, length) = open(file).await?;
        stream.send(&Content { length }).await?;
        // An offset beyond the end gets nothing: the length says why.
        let part = request.offset.min(length)..length;
        send_content(&mut stream, content, part, stride, pace, progress)
            .await
            .map_err(|error| error.in_file(file))
    };
    let served = served.await;
    if let Err(error) = &served {
        stream.abandon(error.code());
    }
    served
}

/// Opens the stream on which the rest of an artefact comes; gives the length of the whole.
async fn ask(
    connection: &Connection,
    digest: Digest,
    limit: u64,
    file: &mut Partial,
    pace: &Pace,
) -> Result<(Stream, u64), LinkError> {
    loop {
        let offset = file.length();
        let mut stream = connection.open().await?;
        stream.send(&Download { digest, offset }).await?;
        let Content { length } = stream.expect(Wait::Within(pace.answer)).await?;
        if length > limit {
            let error = LinkError::from(PeerError::Length { length, limit });
            stream.abandon(error.code());
            return Err(error);
        }
        if offset <= length {
            return Ok((stream, length));
        }
        // What lies here is no beginning of this artefact.
        file.restart()?;
    }
}

/// Where a download of `into` keeps what it has.
#[must_use]
pub fn partial_path(into: &Path) -> PathBuf {
    let mut name = into.as_os_str().to_owned();
    name.push(".part");
    PathBuf::from(name)
}

async fn open(path: &Path) -> Result<(File, u64), LinkError> {
    let owned = path.to_owned();
    let opened = blocking(move || {
        let mut file = File::open(owned)?;
        let length = file.seek(SeekFrom::End(0))?;
        Ok((file, length))
    });
    Ok(opened.await?.map_err(LocalError::file(path))?)
}

async fn open_partial(path: &Path, total: u64) -> Result<Partial, LinkError> {
    let path = path.to_owned();
    Ok(blocking(move || Partial::open(&path, total)).await??)
}
