//! Taking a contribution: who, which slot, which bytes, what they say; then store, log, receipt.

use std::sync::Arc;

use consilium_protocol::artefact::Kind;
use consilium_protocol::contribution::{Statement, Verified};
use consilium_protocol::message::{Ready, Receipt, Upload};
use consilium_protocol::quic::{Complete, LinkError, Stream, receive_upload};
use consilium_protocol::{InstitutionId, RejectCode};

use super::{Shared, validate};
use crate::rounds::Admitted;

/// Room for what PEFT writers put into an adapter's header beyond ours.
const ADAPTER_HEADER: u64 = 1 << 20;

/// Answers one upload.
pub(super) async fn receive(
    mut stream: Stream,
    request: Upload,
    institution: &InstitutionId,
    shared: &Shared,
) -> Result<(), LinkError> {
    let statement = match check(&request, institution, shared) {
        Ok(statement) => statement,
        Err(code) => {
            tracing::warn!(%institution, %code, "upload refused");
            return stream.reject(code).await;
        }
    };
    match shared.driver.admit(statement.body().clone()).await {
        Ok(Admitted::New) => {}
        Ok(Admitted::Repeat(accepted)) => {
            stream
                .send(&Ready {
                    offset: request.length,
                })
                .await?;
            stream.send(&Receipt { accepted }).await?;
            stream.finish();
            return Ok(());
        }
        Err(code) => {
            if code == RejectCode::Equivocation {
                shared.driver.refuse(statement.body().clone(), code).await;
            }
            return stream.reject(code).await;
        }
    }
    match take(&mut stream, &request, &statement, shared).await {
        Ok(receipt) => {
            stream.send(&receipt).await?;
            stream.finish();
            Ok(())
        }
        Err(Refused::Link(error)) => {
            stream.abandon(error.code());
            Err(error)
        }
        Err(Refused::Code(code)) => {
            tracing::warn!(%institution, %code, "upload refused");
            let read = matches!(
                code,
                RejectCode::Content | RejectCode::WrongReference | RejectCode::Equivocation
            );
            if read {
                shared.driver.refuse(statement.body().clone(), code).await;
            }
            stream.reject(code).await
        }
    }
}

fn check(
    request: &Upload,
    institution: &InstitutionId,
    shared: &Shared,
) -> Result<Verified<Statement>, RejectCode> {
    let board = shared.driver.board();
    let binding = board
        .borrow()
        .binding
        .clone()
        .ok_or(RejectCode::WrongRound)?;
    if request.statement.claim().institution != *institution {
        return Err(RejectCode::Identity);
    }
    request
        .statement
        .clone()
        .verify(&shared.roster, &binding)
        .map_err(|refusal| refusal.code())
}

enum Refused {
    Code(RejectCode),
    Link(LinkError),
}

async fn take(
    stream: &mut Stream,
    request: &Upload,
    statement: &Verified<Statement>,
    shared: &Shared,
) -> Result<Receipt, Refused> {
    let blobs = &shared.bench.blobs;
    let artefact = statement.body().artefact;
    if request.length > longest(statement, shared) {
        return Err(Refused::Code(RejectCode::TooLarge));
    }
    // Twice the artefact: its file, and what is made of it.
    let room = blobs
        .free_space()
        .map_err(|_| Refused::Code(RejectCode::Storage))?;
    if room < request.length.saturating_mul(2) {
        return Err(Refused::Code(RejectCode::Storage));
    }
    let (partial, _) = blobs
        .partial(&statement.body().institution, &artefact)
        .map_err(|_| Refused::Code(RejectCode::Storage))?;
    let complete = receive_upload(stream, request, &partial, &shared.pace, &mut |_| {})
        .await
        .map_err(Refused::Link)?;
    let complete = inspect(complete, statement, shared).await?;
    let path = blobs
        .prepare(&artefact)
        .map_err(|_| Refused::Code(RejectCode::Storage))?;
    blocking(move || complete.publish(&path))
        .await?
        .map_err(|error| Refused::Link(error.into()))?;
    shared
        .driver
        .accept(statement.clone(), request.ledger, request.length)
        .await
        .map(|accepted| Receipt { accepted })
        .map_err(Refused::Code)
}

/// Bytes that the slot's artefact can have at most. An adapter has the tensors of the one that all start from, so its file
/// is as long but for the header.
fn longest(statement: &Verified<Statement>, shared: &Shared) -> u64 {
    let kind = statement.body().kind;
    let board = shared.driver.board();
    let start = board.borrow().checks.as_ref().map(|checks| checks.start);
    match (kind, start) {
        (Kind::Adapter, Some(start)) => {
            let start = shared.bench.blobs.length(&start).unwrap_or(0);
            start.saturating_add(ADAPTER_HEADER)
        }
        _ => kind.limit(),
    }
}

/// Reads the received bytes and checks what they say; what does not pass is removed.
async fn inspect(
    complete: Complete,
    statement: &Verified<Statement>,
    shared: &Shared,
) -> Result<Complete, Refused> {
    let (bench, statement) = (Arc::clone(&shared.bench), statement.body().clone());
    let context = shared.driver.board().borrow().checks.clone();
    blocking(move || {
        let Some(context) = context else {
            return Err(RejectCode::WrongRound);
        };
        match validate::contribution(&bench, &context, &statement, complete.path()) {
            Ok(()) => Ok(complete),
            Err(code) => {
                if let Err(error) = complete.discard() {
                    tracing::warn!(%error, "a refused upload could not be removed");
                }
                Err(code)
            }
        }
    })
    .await?
    .map_err(Refused::Code)
}

async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> Result<T, Refused> {
    tokio::task::spawn_blocking(f)
        .await
        .map_err(|_| Refused::Code(RejectCode::Internal))
}
