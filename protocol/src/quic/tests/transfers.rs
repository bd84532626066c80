//! Whole artefacts: uploads and downloads arrive, continue after an interruption, and are refused when they are others.

use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use ed25519_dalek::SigningKey;

use super::{CHUNK, Pair, impatient, noise, quiet};
use crate::artefact::Kind;
use crate::contribution::Statement;
use crate::ids::{ConsortiumId, Digest, InstitutionId, RoundId};
use crate::message::{Logged, Ready, Receipt, Upload};
use crate::quic::chunk::Stride;
use crate::quic::{
    Complete, LinkError, LocalError, Pace, PeerError, Request, Wait, download, partial_path,
    receive_upload, send_content, serve_download, upload,
};
use crate::{RejectCode, limits};

fn announce(content: &[u8]) -> Upload {
    let statement = Statement {
        consortium: ConsortiumId::new("demo").unwrap(),
        round: RoundId(1),
        manifest: Digest::of(b"manifest"),
        institution: InstitutionId::new("st-anna").unwrap(),
        kind: Kind::Adapter,
        sequence: 0,
        artefact: Digest::of(content),
    };
    Upload {
        statement: statement.sign(&SigningKey::from_bytes(&[7; 32])),
        length: content.len() as u64,
        ledger: Digest::of(b"ledger"),
    }
}

fn receipt() -> Receipt {
    Receipt {
        accepted: Logged {
            entry: b"entry".to_vec(),
            proof: "proof".to_owned(),
        },
    }
}

/// What the aggregator does with an upload; policy is left out.
async fn take_upload(pair: &Pair, partial: &Path) -> Result<Complete, LinkError> {
    let mut stream = pair.far.accept().await?;
    let Request::Upload(announced) = stream.request().await? else {
        panic!("another request");
    };
    let pace = Pace::default();
    match receive_upload(&mut stream, &announced, partial, &pace, &mut quiet).await {
        Ok(complete) => {
            stream.send(&receipt()).await?;
            Ok(complete)
        }
        Err(error) => {
            stream.reject(error.code()).await?;
            Err(error)
        }
    }
}

async fn give_upload(pair: &Pair, announced: &Upload, file: &Path) -> Result<Receipt, LinkError> {
    let pace = Pace::default();
    upload(
        &pair.near,
        announced,
        file,
        Stride::FLOATS,
        &pace,
        &mut quiet,
    )
    .await
}

struct Folder {
    root: tempfile::TempDir,
    file: PathBuf,
}

impl Folder {
    fn with(content: &[u8]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("artefact");
        std::fs::write(&file, content).unwrap();
        Self { root, file }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }
}

#[tokio::test]
async fn an_upload_arrives_and_is_receipted() {
    let pair = Pair::new().await;
    for content in [vec![0; 3 << 20], noise((2 << 20) + 1), b"x".to_vec()] {
        let folder = Folder::with(&content);
        let (announced, partial) = (announce(&content), folder.path("incoming"));
        let (taken, given) = tokio::join!(
            take_upload(&pair, &partial),
            give_upload(&pair, &announced, &folder.file)
        );
        assert_eq!(given.unwrap(), receipt());
        let complete = taken.unwrap();
        assert_eq!(complete.digest(), Digest::of(&content));
        complete.publish(&folder.path("stored")).unwrap();
        assert_eq!(std::fs::read(folder.path("stored")).unwrap(), content);
    }
}

#[tokio::test]
async fn an_upload_cut_in_the_middle_continues_where_it_was() {
    let mut pair = Pair::new().await;
    let content = noise((24 << 20) + 17);
    let folder = Folder::with(&content);
    let (announced, partial) = (announce(&content), folder.path("incoming"));
    let cut = async {
        let mut stream = pair.far.accept().await.unwrap();
        stream.request().await.unwrap();
        let mut close = |position| {
            if position >= 8 * CHUNK {
                pair.far.close(RejectCode::ShuttingDown);
            }
        };
        receive_upload(
            &mut stream,
            &announced,
            &partial,
            &Pace::default(),
            &mut close,
        )
        .await
    };
    let (taken, given) = tokio::join!(cut, give_upload(&pair, &announced, &folder.file));
    assert!(
        matches!(taken, Err(LinkError::Local(LocalError::Closed))),
        "{taken:?}"
    );
    let told = given.unwrap_err();
    assert_eq!(told.rejection(), Some(RejectCode::ShuttingDown), "{told:?}");
    assert!(told.is_retryable());

    let kept = std::fs::metadata(&partial).unwrap().len();
    assert!((8 * CHUNK..content.len() as u64).contains(&kept), "{kept}");
    pair.again().await;
    let first = AtomicU64::new(u64::MAX);
    let mut note = |position| {
        first.fetch_min(position, Ordering::SeqCst);
    };
    let pace = Pace::default();
    let (taken, given) = tokio::join!(
        take_upload(&pair, &partial),
        upload(
            &pair.near,
            &announced,
            &folder.file,
            Stride::BYTES,
            &pace,
            &mut note
        )
    );
    given.unwrap();
    assert_eq!(taken.unwrap().digest(), Digest::of(&content));
    assert_eq!(
        first.into_inner(),
        kept + CHUNK,
        "the first chunk sent again"
    );
}

#[tokio::test]
async fn a_repeat_of_a_whole_upload_sends_nothing() {
    let pair = Pair::new().await;
    let content = noise(100_000);
    let folder = Folder::with(&content);
    let partial = folder.path("incoming");
    std::fs::write(&partial, &content).unwrap();
    let mut sent = 0;
    let mut count = |_| sent += 1;
    let (announced, pace) = (announce(&content), Pace::default());
    let (taken, given) = tokio::join!(
        take_upload(&pair, &partial),
        upload(
            &pair.near,
            &announced,
            &folder.file,
            Stride::BYTES,
            &pace,
            &mut count
        )
    );
    given.unwrap();
    taken.unwrap();
    assert_eq!(sent, 0);
}

#[tokio::test]
async fn two_uploads_of_one_artefact_do_not_mix() {
    let pair = Pair::new().await;
    let content = noise(100_000);
    let folder = Folder::with(&content);
    let (announced, partial) = (announce(&content), folder.path("incoming"));
    let mut first = pair.near.open().await.unwrap();
    first.send(&announced).await.unwrap();
    let (taken, refused) = tokio::join!(take_upload(&pair, &partial), async {
        first.expect::<Ready>(Wait::Due).await.unwrap();
        let (taken, refused) = tokio::join!(
            take_upload(&pair, &partial),
            give_upload(&pair, &announced, &folder.file)
        );
        assert!(
            matches!(taken, Err(LinkError::Local(LocalError::Locked(_)))),
            "{taken:?}"
        );
        let (content, pace) = (Cursor::new(content.clone()), Pace::default());
        let all = 0..announced.length;
        send_content(&mut first, content, all, Stride::BYTES, &pace, &mut quiet)
            .await
            .unwrap();
        refused
    });
    assert_eq!(refused.unwrap_err().rejection(), Some(RejectCode::Busy));
    assert_eq!(taken.unwrap().length(), 100_000);
}

#[tokio::test]
async fn content_of_another_digest_is_refused_and_forgotten() {
    let pair = Pair::new().await;
    let content = noise(200_000);
    let folder = Folder::with(&content);
    let mut announced = announce(b"something else");
    announced.length = content.len() as u64;
    let partial = folder.path("incoming");
    let (taken, given) = tokio::join!(
        take_upload(&pair, &partial),
        give_upload(&pair, &announced, &folder.file)
    );
    assert!(
        matches!(taken, Err(LinkError::Peer(PeerError::Digest { .. }))),
        "{taken:?}"
    );
    assert_eq!(given.unwrap_err().rejection(), Some(RejectCode::Digest));
    assert!(!partial.exists());
}

#[tokio::test]
async fn a_file_that_changed_is_noticed_before_it_is_announced() {
    let pair = Pair::new().await;
    let folder = Folder::with(b"longer than before");
    let error = give_upload(&pair, &announce(b"before"), &folder.file)
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            LinkError::Local(LocalError::Length {
                got: 18,
                expected: 6,
                ..
            })
        ),
        "{error:?}"
    );
}

/// Serves one download after the other from one file, until the connection ends.
async fn serve(pair: &Pair, file: &Path) {
    while let Ok(mut stream) = pair.far.accept().await {
        let Ok(Request::Download(request)) = stream.request().await else {
            return;
        };
        let pace = Pace::default();
        // The client's result is what the tests look at.
        let _ = serve_download(stream, &request, file, Stride::BYTES, &pace, &mut quiet).await;
    }
}

async fn fetch(pair: &Pair, digest: Digest, into: &Path, file: &Path) -> Result<u64, LinkError> {
    let (pace, mut progress) = (Pace::default(), quiet);
    tokio::select! {
        () = serve(pair, file) => panic!("the connection ended"),
        fetched = download(&pair.near, digest, into, limits::SHARD, &pace, &mut progress) => fetched,
    }
}

#[tokio::test]
async fn a_download_cut_in_the_middle_continues_and_appears_whole() {
    let mut pair = Pair::new().await;
    let content = noise((24 << 20) + 17);
    let folder = Folder::with(&content);
    let (digest, into) = (Digest::of(&content), folder.path("fetched"));
    let near = pair.near.clone();
    let mut close = |position| {
        if position >= 8 * CHUNK {
            near.close_quietly();
        }
    };
    let pace = Pace::default();
    let (error, ()) = tokio::join!(
        download(&pair.near, digest, &into, limits::SHARD, &pace, &mut close),
        serve(&pair, &folder.file)
    );
    assert!(
        matches!(error, Err(LinkError::Local(LocalError::Closed))),
        "{error:?}"
    );
    assert!(!into.exists());
    let kept = std::fs::metadata(partial_path(&into)).unwrap().len();
    assert!((8 * CHUNK..content.len() as u64).contains(&kept), "{kept}");

    pair.again().await;
    let length = fetch(&pair, digest, &into, &folder.file).await.unwrap();
    assert_eq!(length, content.len() as u64);
    assert!(std::fs::read(&into).unwrap() == content);
    assert!(!partial_path(&into).exists());
}

#[tokio::test]
async fn a_download_of_something_else_leaves_nothing_and_the_connection_survives() {
    let pair = Pair::new().await;
    let folder = Folder::with(b"not what was asked for");
    let into = folder.path("fetched");
    // Left by another artefact, and longer than this one.
    std::fs::write(partial_path(&into), noise(1000)).unwrap();
    let error = fetch(&pair, Digest::of(b"wanted"), &into, &folder.file)
        .await
        .unwrap_err();
    assert!(
        matches!(error, LinkError::Peer(PeerError::Digest { .. })),
        "{error:?}"
    );
    assert!(!into.exists() && !partial_path(&into).exists());
    let digest = Digest::of(b"not what was asked for");
    fetch(&pair, digest, &into, &folder.file).await.unwrap();
}

#[tokio::test]
async fn a_download_longer_than_allowed_or_gone_is_refused() {
    let pair = Pair::new().await;
    let content = noise(1001);
    let folder = Folder::with(&content);
    let (digest, pace, mut progress) = (Digest::of(&content), Pace::default(), quiet);
    let into = folder.path("fetched");
    let error = tokio::select! {
        () = serve(&pair, &folder.file) => panic!("the connection ended"),
        fetched = download(&pair.near, digest, &into, 1000, &pace, &mut progress) => fetched.unwrap_err(),
    };
    assert_eq!(error.code(), RejectCode::TooLarge, "{error:?}");
    let error = fetch(&pair, digest, &into, &folder.path("missing"))
        .await
        .unwrap_err();
    assert_eq!(error.rejection(), Some(RejectCode::Internal), "{error:?}");
    assert!(!partial_path(&into).exists());
}

#[tokio::test]
async fn an_answer_that_does_not_come_is_not_waited_for() {
    let pair = Pair::new().await;
    let folder = Folder::with(b"content");
    let announced = announce(b"content");
    let pace = impatient();
    let error = upload(
        &pair.near,
        &announced,
        &folder.file,
        Stride::BYTES,
        &pace,
        &mut quiet,
    )
    .await
    .unwrap_err();
    assert!(
        matches!(error, LinkError::Peer(PeerError::Late { .. })),
        "{error:?}"
    );
    let digest = Digest::of(b"content");
    let error = download(&pair.near, digest, &folder.path("x"), 10, &pace, &mut quiet)
        .await
        .unwrap_err();
    assert!(error.is_retryable(), "{error:?}");
}
