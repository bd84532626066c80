//! The one owner of log and round. Everybody else asks it through [`Driver`]; it logs first and then steps.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use consilium_protocol::contribution::{Statement, Verified};
use consilium_protocol::event::Event;
use consilium_protocol::message::Logged;
use consilium_protocol::quic::Tasks;
use consilium_protocol::time::Clock;
use consilium_protocol::{Digest, InstitutionId, RejectCode};
use tokio::sync::{mpsc, oneshot, watch};

use super::board::Board;
use super::opening::Answer;
use super::state::{Admitted, State};
use super::work::WorkError;

const TICK: Duration = Duration::from_millis(200);
const RETRY: Duration = Duration::from_secs(30);
const QUEUE: usize = 256;

/// A handle to the driver; clones share it.
#[derive(Debug, Clone)]
pub struct Driver {
    commands: mpsc::Sender<Command>,
    board: watch::Receiver<Arc<Board>>,
}

/// What others ask of the driver.
#[derive(Debug)]
enum Command {
    Greeting {
        from: u64,
        reply: oneshot::Sender<(String, Vec<Digest>)>,
    },
    Joined {
        institution: InstitutionId,
        capacity: u32,
    },
    Left {
        institution: InstitutionId,
    },
    Admit {
        statement: Box<Statement>,
        reply: oneshot::Sender<Result<Admitted, RejectCode>>,
    },
    Accept {
        statement: Box<Verified<Statement>>,
        ledger: Digest,
        length: u64,
        reply: oneshot::Sender<Result<Logged, RejectCode>>,
    },
    Refuse {
        statement: Box<Statement>,
        code: RejectCode,
        reply: oneshot::Sender<()>,
    },
    Worked(Box<Result<Event, WorkError>>),
}

impl Driver {
    /// Starts the driver on a state that was loaded from disk.
    #[must_use]
    pub fn start(state: State, clock: Arc<dyn Clock>, tasks: &Tasks) -> Self {
        let (commands, queue) = mpsc::channel(QUEUE);
        let (sender, board) = watch::channel(Arc::new(Board::default()));
        let actor = Actor {
            state,
            clock,
            board: sender,
            commands: commands.clone(),
            tasks: tasks.clone(),
            connections: BTreeMap::new(),
            working: false,
            changed: true,
        };
        tasks.spawn("round driver", actor.run(queue));
        Self { commands, board }
    }

    /// Snapshots as they change.
    #[must_use]
    pub fn board(&self) -> watch::Receiver<Arc<Board>> {
        self.board.clone()
    }

    /// The newest checkpoint and the consistency proof from an older size.
    pub async fn greeting(&self, from: u64) -> Option<(String, Vec<Digest>)> {
        self.ask(|reply| Command::Greeting { from, reply }).await
    }

    /// A member's node has connected.
    pub async fn joined(&self, institution: InstitutionId, capacity: u32) {
        self.tell(Command::Joined {
            institution,
            capacity,
        })
        .await;
    }

    /// A member's node has gone.
    pub async fn left(&self, institution: InstitutionId) {
        self.tell(Command::Left { institution }).await;
    }

    /// Whether a contribution may come in now.
    ///
    /// # Errors
    /// The code for the peer.
    pub async fn admit(&self, statement: Statement) -> Result<Admitted, RejectCode> {
        let statement = Box::new(statement);
        self.ask(|reply| Command::Admit { statement, reply })
            .await
            .unwrap_or(Err(RejectCode::ShuttingDown))
    }

    /// Takes a stored contribution into the log and the round; the answer is its receipt.
    ///
    /// # Errors
    /// The code for the peer.
    pub async fn accept(
        &self,
        statement: Verified<Statement>,
        ledger: Digest,
        length: u64,
    ) -> Result<Logged, RejectCode> {
        let statement = Box::new(statement);
        self.ask(|reply| Command::Accept {
            statement,
            ledger,
            length,
            reply,
        })
        .await
        .unwrap_or(Err(RejectCode::ShuttingDown))
    }

    /// Notes in the log that a contribution was refused; the sender is told after that.
    pub async fn refuse(&self, statement: Statement, code: RejectCode) {
        let statement = Box::new(statement);
        self.ask(|reply| Command::Refuse {
            statement,
            code,
            reply,
        })
        .await;
    }

    async fn tell(&self, command: Command) {
        // Fails only while the program ends.
        let _ = self.commands.send(command).await;
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (sender, receiver) = oneshot::channel();
        self.commands.send(command(sender)).await.ok()?;
        receiver.await.ok()
    }
}

struct Actor {
    state: State,
    clock: Arc<dyn Clock>,
    board: watch::Sender<Arc<Board>>,
    commands: mpsc::Sender<Command>,
    tasks: Tasks,
    connections: BTreeMap<InstitutionId, (usize, u32)>,
    working: bool,
    changed: bool,
}

impl Actor {
    async fn run(mut self, mut queue: mpsc::Receiver<Command>) {
        let mut tick = tokio::time::interval(TICK);
        self.advance();
        loop {
            tokio::select! {
                () = self.tasks.cancelled() => break,
                Some(command) = queue.recv() => self.handle(command),
                _ = tick.tick() => self.tick(),
            }
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Greeting { from, reply } => {
                let _ = reply.send(self.state.greeting(from));
            }
            Command::Joined {
                institution,
                capacity,
            } => self.join(institution, capacity),
            Command::Left { institution } => {
                if let Some((live, _)) = self.connections.get_mut(&institution) {
                    *live = live.saturating_sub(1);
                }
                self.changed = true;
                self.advance();
            }
            Command::Admit { statement, reply } => {
                let admitted = self.state.admit(&statement);
                // Late, but alive: a member that was dropped takes part again.
                if admitted == Err(RejectCode::WrongPhase)
                    && let Some((_, capacity)) = self.connections.get(&statement.institution)
                {
                    self.note_joined(statement.institution.clone(), *capacity);
                }
                let _ = reply.send(admitted);
            }
            Command::Accept {
                statement,
                ledger,
                length,
                reply,
            } => {
                let accepted =
                    self.block(|state, now| state.accept(now, &statement, ledger, length));
                self.changed = true;
                let _ = reply.send(accepted);
                self.advance();
            }
            Command::Refuse {
                statement,
                code,
                reply,
            } => {
                self.block(|state, now| state.refuse(now, &statement, code));
                let _ = reply.send(());
            }
            Command::Worked(outcome) => {
                self.working = false;
                let taken = match *outcome {
                    Ok(event) => self.record(&event),
                    Err(error) => {
                        tracing::error!(%error, "the round cannot go on; trying again soon");
                        false
                    }
                };
                if !taken {
                    self.work(RETRY);
                }
            }
        }
    }

    fn tick(&mut self) {
        let answers = self.block(State::open_requested_rounds);
        if answers.iter().any(Answer::is_opened) {
            self.changed = true;
            let present: Vec<_> = self
                .connections
                .iter()
                .filter(|(_, (live, _))| *live > 0)
                .map(|(who, (_, capacity))| (who.clone(), *capacity))
                .collect();
            for (institution, capacity) in present {
                self.note_joined(institution, capacity);
            }
        }
        self.advance();
        self.block(|_, _| answers.iter().for_each(Answer::give));
    }

    fn join(&mut self, institution: InstitutionId, capacity: u32) {
        let entry = self.connections.entry(institution.clone()).or_default();
        *entry = (entry.0.saturating_add(1), capacity);
        self.changed = true;
        self.note_joined(institution, capacity);
        self.advance();
    }

    fn note_joined(&mut self, institution: InstitutionId, capacity: u32) {
        if self.state.wants_join(&institution, capacity) {
            self.record(&Event::Joined {
                institution,
                capacity,
            });
        }
    }

    /// Logs an event, steps the round, and goes on from there. False if it could not be logged.
    fn record(&mut self, event: &Event) -> bool {
        if let Err(error) = self.block(|state, now| state.record(now, event)) {
            tracing::error!(%error, "an event could not be logged");
            return false;
        }
        self.changed = true;
        self.advance();
        true
    }

    /// Closes what is due, starts what is to be done, shows what has become of it.
    fn advance(&mut self) {
        while let Some(event) = self.state.due(self.clock.now()) {
            if let Err(error) = self.block(|state, now| state.record(now, &event)) {
                tracing::error!(%error, "a phase could not be closed");
                break;
            }
            self.changed = true;
        }
        self.work(Duration::ZERO);
        if std::mem::take(&mut self.changed) {
            self.publish();
        }
    }

    /// Starts what the round waits for, unless it runs already. Whatever happens to it, its outcome comes back.
    fn work(&mut self, after: Duration) {
        if self.working {
            return;
        }
        let Some(job) = self.state.job() else { return };
        self.working = true;
        let (commands, tasks) = (self.commands.clone(), self.tasks.clone());
        self.tasks.spawn("work of the round", async move {
            tokio::select! {
                () = tasks.cancelled() => return,
                () = tokio::time::sleep(after) => {}
            }
            let outcome = tokio::task::spawn_blocking(job).await;
            let outcome = outcome.unwrap_or_else(|error| Err(WorkError::ended(error)));
            // Fails only while the program ends.
            let _ = commands.send(Command::Worked(Box::new(outcome))).await;
        });
    }

    fn publish(&mut self) {
        let live: BTreeMap<_, _> = self
            .connections
            .iter()
            .map(|(who, (live, _))| (who.clone(), *live))
            .collect();
        let board = Arc::new(self.state.board());
        self.board.send_replace(board);
        if let Err(error) = self.block(|state, _| state.write_overview(&live)) {
            tracing::warn!(%error, "status.json could not be written");
        }
    }

    /// Runs what touches the disk for a few milliseconds.
    fn block<R>(&mut self, f: impl FnOnce(&mut State, consilium_protocol::UnixMillis) -> R) -> R {
        let now = self.clock.now();
        tokio::task::block_in_place(|| f(&mut self.state, now))
    }
}

/// Where the data folder keeps the operator's view.
#[must_use]
pub fn overview_path(data_dir: &std::path::Path) -> PathBuf {
    data_dir.join("status.json")
}
