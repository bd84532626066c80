//! One node's connection: greeting, pushed status, requests.

use consilium_protocol::frame;
use consilium_protocol::message::{Download, Hello, Logged, Status, Task, Welcome};
use consilium_protocol::quic::{Connection, LinkError, Request, Stream, Tasks, serve_download};
use consilium_protocol::{InstitutionId, RejectCode};
use tokio::sync::watch;

use super::{Shared, upload};
use crate::rounds::Board;

/// Serves a connection until it ends.
pub(super) async fn run(connection: Connection, shared: &Shared, tasks: &Tasks) {
    let institution = connection.peer().institution.clone();
    let ended = tokio::select! {
        () = tasks.cancelled() => {
            connection.close(RejectCode::ShuttingDown);
            Ok(())
        }
        ended = converse(&connection, &institution, shared, tasks) => ended,
    };
    match ended {
        Ok(()) => tracing::info!(%institution, "session ended"),
        Err(error) => {
            tracing::warn!(%institution, %error, "session ended");
            connection.close(error.code());
        }
    }
}

async fn converse(
    connection: &Connection,
    institution: &InstitutionId,
    shared: &Shared,
    tasks: &Tasks,
) -> Result<(), LinkError> {
    let mut control = connection.accept().await?;
    // A refusal closes the connection with its code: a frame on the control stream could be overtaken by the close.
    let Request::Hello(hello) = control.request().await? else {
        connection.close(RejectCode::Malformed);
        return Ok(());
    };
    if let Err(code) = check(&hello, institution, shared) {
        tracing::warn!(%institution, %code, "hello refused");
        connection.close(code);
        return Ok(());
    }
    let Some((checkpoint, consistency)) = shared.driver.greeting(hello.log_size).await else {
        connection.close(RejectCode::ShuttingDown);
        return Ok(());
    };
    let version = hello.version.min(frame::VERSION);
    let welcome = Welcome {
        version,
        charter: shared.charter,
        checkpoint,
        consistency,
    };
    control.send(&welcome).await?;
    tracing::info!(%institution, software = %hello.software, capacity = hello.capacity, "joined");
    shared
        .driver
        .joined(institution.clone(), hello.capacity)
        .await;
    let served = serve(connection, &mut control, institution, shared, tasks).await;
    shared.driver.left(institution.clone()).await;
    served
}

fn check(hello: &Hello, institution: &InstitutionId, shared: &Shared) -> Result<(), RejectCode> {
    if hello.version < frame::OLDEST_VERSION {
        Err(RejectCode::Version)
    } else if hello.institution != *institution || hello.consortium != shared.consortium {
        Err(RejectCode::Identity)
    } else {
        Ok(())
    }
}

async fn serve(
    connection: &Connection,
    control: &mut Stream,
    institution: &InstitutionId,
    shared: &Shared,
    tasks: &Tasks,
) -> Result<(), LinkError> {
    let mut board = shared.driver.board();
    let mut last = None;
    push(control, &mut board, institution, &mut last).await?;
    loop {
        tokio::select! {
            stream = connection.accept() => {
                let (shared, institution) = (shared.clone(), institution.clone());
                let stream = stream?;
                tasks.spawn(format!("request of {institution}"), async move {
                    answer(stream, institution, &shared).await;
                });
            }
            changed = board.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                push(control, &mut board, institution, &mut last).await?;
            }
        }
    }
}

/// Sends the status if it is not the one that the node has.
async fn push(
    control: &mut Stream,
    board: &mut watch::Receiver<std::sync::Arc<Board>>,
    institution: &InstitutionId,
    last: &mut Option<Status>,
) -> Result<(), LinkError> {
    let status = board
        .borrow_and_update()
        .statuses
        .get(institution)
        .cloned()
        .unwrap_or(Status {
            round: None,
            task: Task::Wait,
        });
    if last.as_ref().is_some_and(|last| same(last, &status)) {
        return Ok(());
    }
    control.send(&status).await?;
    *last = Some(status);
    Ok(())
}

/// Whether two statuses ask for the same, whatever checkpoint their proofs are against.
fn same(a: &Status, b: &Status) -> bool {
    let entry = |logged: &Logged| logged.entry.clone();
    let tasks = match (&a.task, &b.task) {
        (
            Task::Distil {
                inner,
                start,
                targets,
                part,
            },
            Task::Distil {
                inner: other,
                start: start_b,
                targets: targets_b,
                part: part_b,
            },
        ) => {
            (inner, part) == (other, part_b)
                && start.entry == start_b.entry
                && targets.entry == targets_b.entry
        }
        (
            Task::Train { inner, start },
            Task::Train {
                inner: other,
                start: start_b,
            },
        ) => inner == other && start.entry == start_b.entry,
        (Task::Evaluate { candidate: a }, Task::Evaluate { candidate: b })
        | (Task::Finished { outcome: a }, Task::Finished { outcome: b }) => a.entry == b.entry,
        (a, b) => a == b,
    };
    tasks && a.round.as_ref().map(entry) == b.round.as_ref().map(entry)
}

async fn answer(mut stream: Stream, institution: InstitutionId, shared: &Shared) {
    let answered = match stream.request().await {
        Ok(Request::Upload(request)) => {
            upload::receive(stream, request, &institution, shared).await
        }
        Ok(Request::Download(request)) => send(stream, request, shared).await,
        Ok(Request::Hello(_)) => stream.reject(RejectCode::Malformed).await,
        Err(error) => {
            stream.abandon(error.code());
            Err(error)
        }
    };
    if let Err(error) = answered {
        tracing::warn!(%institution, %error, "request failed");
    }
}

async fn send(stream: Stream, request: Download, shared: &Shared) -> Result<(), LinkError> {
    let board = shared.driver.board();
    let stride = board.borrow().public.get(&request.digest).copied();
    let blobs = &shared.bench.blobs;
    let Some(stride) = stride.filter(|_| blobs.has(&request.digest)) else {
        return stream.reject(RejectCode::NotFound).await;
    };
    let path = blobs.path(&request.digest);
    serve_download(stream, &request, &path, stride, &shared.pace, &mut |_| {}).await
}
