//! One connection: greeting, then following the aggregator's status until the connection ends.
//!
//! Status is level-triggered: the latest one counts, and acting on it twice does what acting once does. Waits end when a
//! new status comes; a transfer that has begun goes on to its end.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use consilium_protocol::Digest;
use consilium_protocol::PeerIdentity;
use consilium_protocol::artefact::Kind;
use consilium_protocol::contribution::Statement;
use consilium_protocol::event::Event;
use consilium_protocol::message::{Logged, Receipt, Status, Welcome};
use consilium_protocol::quic::chunk::Stride;
use consilium_protocol::quic::{Connection, LinkError, Pace, Stream, Wait, upload};
use tokio::sync::watch;
use tokio::time::Instant;

use super::gate::{GateError, Permit};
use super::ledger::Slot;
use super::round::OpenRound;
use super::tasks::{Plan, PlannedJob};
use super::trust::TrustError;
use super::{Agent, AgentError};
use crate::spool::{JobId, Outcome};

/// Longest wait for the answer to the greeting: the aggregator may log it first.
const GREETING: Duration = Duration::from_secs(30);
/// Pause between two looks for a result of the worker.
pub(super) const POLL: Duration = Duration::from_millis(100);
/// Attempts of a job that fails.
const ATTEMPTS: u32 = 3;
/// Wait before the second attempt of a job that failed; each further one waits so much longer.
const JOB_RETRY: Duration = Duration::from_secs(10);

/// What to do after a step.
pub(super) enum Next {
    /// The next step at once.
    Again,
    /// Again after this time, or when a status comes.
    After(Duration),
    /// Nothing until a status comes.
    Idle,
}

pub(super) struct Session<'a> {
    pub(super) agent: &'a mut Agent,
    pub(super) connection: Connection,
    pub(super) pace: Pace,
    /// The round of the last status, by its entry; none if it was refused.
    pub(super) round: Option<(Digest, Option<Arc<OpenRound>>)>,
    pub(super) plan: Option<Plan>,
    recipient: PeerIdentity,
    /// Slots that need nothing more on this connection.
    settled: BTreeSet<Slot>,
}

/// Connects and works until the connection ends; says why it did.
pub(super) async fn run(agent: &mut Agent) -> AgentError {
    let address = agent.config.aggregator.to_string();
    match connected(agent).await {
        Err(Ended::Link(source)) => AgentError::Link { address, source },
        Err(Ended::Agent(error)) => *error,
        Ok(never) => match never {},
    }
}

/// Why a connection ended.
pub(super) enum Ended {
    Link(LinkError),
    Agent(Box<AgentError>),
}

impl From<LinkError> for Ended {
    fn from(error: LinkError) -> Self {
        Self::Link(error)
    }
}

impl<T: Into<AgentError>> From<T> for Ended {
    fn from(error: T) -> Self {
        Self::Agent(Box::new(error.into()))
    }
}

async fn connected(agent: &mut Agent) -> Result<std::convert::Infallible, Ended> {
    let (host, name) = (
        agent.config.aggregator.to_string(),
        agent.config.server_name.clone(),
    );
    let connection = agent.client.connect(&host, &name).await?;
    let mut control = connection.open().await?;
    control.send(&agent.hello()).await?;
    let welcome: Welcome = control.expect(Wait::Within(GREETING)).await?;
    agent.trust.welcome(&welcome)?;
    agent.reconnect.reset();
    let recipient = connection.peer().clone();
    tracing::info!(%recipient, log = agent.trust.log_size(), "connected");
    let (sender, statuses) = watch::channel(None);
    let mut session = Session {
        agent,
        connection: connection.clone(),
        pace: Pace::default(),
        round: None,
        plan: None,
        recipient,
        settled: BTreeSet::new(),
    };
    let ended = tokio::select! {
        ended = read_statuses(&mut control, &sender) => ended,
        ended = session.follow(statuses) => ended,
    };
    connection.close_quietly();
    ended
}

async fn read_statuses(
    control: &mut Stream,
    statuses: &watch::Sender<Option<Status>>,
) -> Result<std::convert::Infallible, Ended> {
    loop {
        let status = control.expect::<Status>(Wait::Connected).await?;
        statuses.send_replace(Some(status));
    }
}

impl Session<'_> {
    async fn follow(
        &mut self,
        mut statuses: watch::Receiver<Option<Status>>,
    ) -> Result<std::convert::Infallible, Ended> {
        loop {
            let status = statuses.borrow_and_update().clone();
            let next = match &status {
                Some(status) => self.advance(status).await?,
                None => Next::Idle,
            };
            // The sender lives as long as this future; an error cannot come.
            match next {
                Next::Again => {}
                Next::After(wait) => {
                    let _ = tokio::time::timeout(wait, statuses.changed()).await;
                }
                Next::Idle => {
                    let _ = statuses.changed().await;
                }
            }
        }
    }

    async fn advance(&mut self, status: &Status) -> Result<Next, Ended> {
        let known = self.plan.as_mut().is_some_and(|plan| plan.take_on(status));
        if !known {
            self.plan = None;
            match self.prepare(status).await {
                Ok(plan) => self.plan = Some(plan),
                Err(Ended::Link(LinkError::Rejected(code))) if code.is_retryable() => {
                    let wait = self.agent.transfer.next_wait();
                    tracing::warn!(%code, ?wait, "the aggregator cannot serve a download now");
                    return Ok(Next::After(wait));
                }
                Err(Ended::Link(LinkError::Rejected(code))) => {
                    tracing::error!(%code, "the aggregator refuses a download that its task needs");
                    return Ok(Next::Idle);
                }
                Err(other) => return Err(other),
            }
        }
        self.work().await
    }

    /// Looks for results of the plan's jobs and hands over the first that is there.
    async fn work(&mut self) -> Result<Next, Ended> {
        let Some(plan) = &self.plan else {
            return Ok(Next::Idle);
        };
        let Some(round) = plan.round.clone() else {
            return Ok(Next::Idle);
        };
        let jobs: Vec<PlannedJob> = plan.jobs.clone();
        let home = plan.home.clone();
        let mut waiting = false;
        for job in jobs {
            if self.is_settled(&round, &job) {
                continue;
            }
            match self.agent.spool.outcome(&job.id)? {
                Some(Outcome::Done {
                    artefact,
                    seconds,
                    notes,
                }) => {
                    tracing::info!(job = %job.id, seconds, ?notes, "done");
                    return self.hand_over(&round, &job, artefact).await;
                }
                Some(Outcome::Failed { problem }) => {
                    waiting |= self.failed(&round, &job, &problem)?;
                }
                None => {
                    // The worker keeps the order: what follows is not done either.
                    waiting = true;
                    break;
                }
            }
        }
        if let Some(home) = home {
            return self.work_at_home(&round, &home);
        }
        Ok(if waiting {
            Next::After(POLL)
        } else {
            Next::Idle
        })
    }

    /// Whether the job needs nothing more on this connection.
    pub(super) fn is_settled(&self, round: &OpenRound, job: &PlannedJob) -> bool {
        self.settled.contains(&slot(round, job))
    }

    /// Whether the job is tried again.
    pub(super) fn failed(
        &mut self,
        round: &OpenRound,
        job: &PlannedJob,
        problem: &str,
    ) -> Result<bool, Ended> {
        let now = Instant::now();
        let known = self.agent.failures.get(&job.id).copied();
        match known {
            Some((_, retry_at)) if now < retry_at => Ok(true),
            Some((count, _)) if count < ATTEMPTS => {
                self.agent.spool.reset(&job.id)?;
                let next = JOB_RETRY.saturating_mul(count.saturating_add(1));
                let entry = (count.saturating_add(1), now + next);
                self.agent.failures.insert(job.id.clone(), entry);
                Ok(true)
            }
            Some(_) => {
                tracing::error!(job = %job.id, problem, "failed {ATTEMPTS} times; given up until the node restarts");
                self.settled.insert(slot(round, job));
                Ok(false)
            }
            None => {
                tracing::error!(job = %job.id, problem, "the worker failed; trying again");
                let entry = (1, now + JOB_RETRY);
                self.agent.failures.insert(job.id.clone(), entry);
                Ok(true)
            }
        }
    }

    /// Passes the gate and hands an artefact over.
    async fn hand_over(
        &mut self,
        round: &Arc<OpenRound>,
        job: &PlannedJob,
        artefact: Digest,
    ) -> Result<Next, Ended> {
        let institution = &self.agent.config.institution;
        let statement = round.statement(institution, job.kind, job.sequence, artefact);
        let slot = slot(round, job);
        let Some(permit) = self.release(round, &job.id, &statement).await? else {
            self.settled.insert(slot);
            return Ok(Next::Again);
        };
        let sent = self.send(permit).await;
        let code = match sent {
            Ok(receipt) => {
                self.receipt(&statement, &receipt).await?;
                tracing::info!(%slot, %artefact, "accepted and logged");
                self.agent.transfer.reset();
                self.agent.failures.remove(&job.id);
                self.settled.insert(slot);
                return Ok(Next::Again);
            }
            Err(LinkError::Rejected(code)) => code,
            Err(error) => return Err(error.into()),
        };
        if code.is_retryable() {
            let wait = self.agent.transfer.next_wait();
            tracing::warn!(%slot, %code, ?wait, "refused for now");
            return Ok(Next::After(wait));
        }
        tracing::error!(%slot, %artefact, %code, "refused by the aggregator");
        self.agent
            .with_gate(move |gate| gate.refused(&statement, code))
            .await??;
        self.settled.insert(slot);
        Ok(Next::Again)
    }

    /// A permit, or none if the gate does not let it pass.
    async fn release(
        &self,
        round: &Arc<OpenRound>,
        job: &JobId,
        statement: &Statement,
    ) -> Result<Option<Permit>, Ended> {
        let path = self.agent.spool.blob_path(&statement.artefact);
        let (open, recipient) = (Arc::clone(round), self.recipient.clone());
        let asked = statement.clone();
        let passed = self
            .agent
            .with_gate(move |gate| gate.release(&open.manifest, asked, &path, &recipient))
            .await?;
        match passed {
            Ok(permit) => Ok(Some(permit)),
            Err(error @ (GateError::Digest { .. } | GateError::Read { .. })) => {
                tracing::warn!(%job, error = &error as &dyn std::error::Error, "made again");
                self.agent.spool.remove_blob(&statement.artefact)?;
                self.agent.spool.reset(job)?;
                Err(AgentError::Gate(error).into())
            }
            Err(error @ GateError::Ledger(_)) => Err(AgentError::Gate(error).into()),
            Err(refusal) => {
                tracing::error!(%job, reason = &refusal as &dyn std::error::Error, "the egress gate refuses");
                Ok(None)
            }
        }
    }

    /// The only way out of the site: it takes a permit.
    async fn send(&self, permit: Permit) -> Result<Receipt, LinkError> {
        let (announced, file) = permit.into_upload(self.agent.member.signing.signing_key());
        let kind = announced.statement.claim().kind;
        let stride = match kind {
            Kind::Adapter => Stride::FLOATS,
            Kind::Records | Kind::Evaluation => Stride::BYTES,
        };
        let mut progress = |sent: u64| {
            tracing::debug!(kind = kind.name(), sent, of = announced.length, "sending");
        };
        upload(
            &self.connection,
            &announced,
            &file,
            stride,
            &self.pace,
            &mut progress,
        )
        .await
    }

    /// Checks the proof that our very contribution is in the log, then notes it in the ledger.
    async fn receipt(&self, statement: &Statement, receipt: &Receipt) -> Result<(), Ended> {
        let Logged { entry, proof } = &receipt.accepted;
        let logged = self.agent.trust.entry(&receipt.accepted)?;
        let ours = matches!(&logged.event, Event::Accepted { institution, kind, sequence, artefact, .. }
            if *institution == statement.institution
                && *kind == statement.kind
                && *sequence == statement.sequence
                && *artefact == statement.artefact);
        if !ours || logged.round != statement.round {
            return Err(TrustError::Unexpected("the acceptance of what was sent").into());
        }
        let entry = String::from_utf8_lossy(entry).into_owned();
        let (statement, proof) = (statement.clone(), proof.clone());
        self.agent
            .with_gate(move |gate| gate.acknowledge(&statement, entry, proof))
            .await??;
        Ok(())
    }
}

fn slot(round: &OpenRound, job: &PlannedJob) -> Slot {
    Slot {
        round: round.manifest.round,
        manifest: round.digest,
        kind: job.kind,
        sequence: job.sequence,
    }
}
