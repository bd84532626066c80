//! The program `consilium-node`: stdout is the result, stderr is talk and log.

use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser as _;
use consilium_certs::leaf::{self, LeafProfile, TlsKey};
use consilium_certs::{Overwrite, folder, pem};
use consilium_kernels::RecordShape;
use consilium_protocol::Clock as _;
use consilium_protocol::quic::Tasks;
use consilium_protocol::time::SystemClock;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::{FilterExt as _, LevelFilter, filter_fn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use crate::agent;
use crate::agent::ledger::Chain;
use crate::args::{
    Cli, Command, ConfigArgs, EvaluateArgs, InitArgs, LedgerCommand, LogFormat, ScoreArgs,
    ScorerArgs, Threads, TokensArgs,
};
use crate::config::{self, Config};
use crate::error::NodeError;
use crate::reply::Reply;
use crate::scorer::{self, Scorer};
use crate::spool::Spool;
use crate::status;
use crate::supervise::{ChildProgram, children_of, keep_running};
use crate::training;
use crate::worker::commands;
use crate::worker::progress::Terminal;
use crate::worker::{self, Folders, RunOptions, WorkError};

/// How long agent and worker have to end after a signal.
const GRACE: Duration = Duration::from_secs(20);
/// Threads of the network half.
const NETWORK_THREADS: usize = 2;

/// Runs the program; `args` begins with its name.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing is left to do if the terminal is gone.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    log_to_stderr(cli.log_format);
    let json = cli.json;
    let reply = run(cli).unwrap_or_else(|error| Reply::failed(&error));
    reply.print(json);
    ExitCode::from(reply.status())
}

fn run(cli: Cli) -> Result<Reply, NodeError> {
    match cli.command {
        Command::Init(args) => init(&args),
        Command::Run(args) => {
            let config = load(&args)?;
            let children = children_of(&config, cli.log_format.name())?;
            serve(&config, children)
        }
        Command::Agent(args) => serve(&load(&args)?, Vec::new()),
        Command::Worker { config, supervised } => work(&load(&config)?, supervised),
        Command::Scorer(args) => scorer(&args),
        Command::Train(args) => training::train(&args, cli.json),
        Command::Plan(args) => training::plan(&args, cli.json),
        Command::Score(args) => score(&args),
        Command::Tokens(args) => tokens(&args),
        Command::Evaluate(args) => evaluate(&args),
        Command::Status(args) => status::of(&load(&args)?),
        Command::Ledger { command } => match command {
            LedgerCommand::Show(args) => show_ledger(&load(&args)?),
            LedgerCommand::Verify(args) => verify_ledger(&load(&args)?),
        },
    }
}

fn load(args: &ConfigArgs) -> Result<Config, NodeError> {
    Ok(Config::load(&args.config)?)
}

/// The agent, and its children beside it, until a signal comes.
fn serve(config: &Config, children: Vec<ChildProgram>) -> Result<Reply, NodeError> {
    let system = |doing| move |source| NodeError::System { doing, source };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(NETWORK_THREADS)
        .enable_all()
        .build()
        .map_err(system("start threads"))?;
    let ended = runtime.block_on(async {
        let (mut terminate, mut interrupt) = (
            signal(SignalKind::terminate()).map_err(system("watch for signals"))?,
            signal(SignalKind::interrupt()).map_err(system("watch for signals"))?,
        );
        let tasks = Tasks::new();
        let token = tasks.token().clone();
        tasks.spawn("signals", async move {
            tokio::select! {
                _ = terminate.recv() => tracing::info!("SIGTERM: ending"),
                _ = interrupt.recv() => tracing::info!("SIGINT: ending"),
                () = token.cancelled() => {}
            }
            token.cancel();
        });
        for program in children {
            let seed = SystemClock.now().0;
            tasks.spawn(program.name(), keep_running(program, tasks.clone(), seed));
        }
        let ended = agent::run(config, Arc::new(SystemClock), &tasks).await;
        let report = tasks.shutdown(GRACE).await;
        if !report.is_clean() {
            tracing::error!(?report, "did not end cleanly");
        }
        Ok::<_, NodeError>(ended?)
    });
    // A file that is still being hashed does not hold up the end.
    runtime.shutdown_timeout(Duration::from_secs(1));
    ended.map(|()| Reply::done("ended"))
}

fn work(config: &Config, supervised: bool) -> Result<Reply, NodeError> {
    let folders = Folders::from(config);
    let options = RunOptions {
        threads: config.worker.threads,
        memory: config.worker.memory,
        end_with_parent: supervised,
    };
    worker::run(folders, options)?;
    Ok(Reply::done("ended"))
}

fn scorer(args: &ScorerArgs) -> Result<Reply, NodeError> {
    let settings = args.settings()?;
    if args.probe {
        let probed = Scorer::new(&settings)?.probe(&|| false)?;
        let url = &settings.server.url;
        return Ok(Reply::done(format!("{url} can score"))
            .with("tokens_per_position", probed.top)
            .with("spellings_compared", probed.compared));
    }
    scorer::run(&settings, args.supervised)?;
    Ok(Reply::done("ended"))
}

fn tokens(args: &TokensArgs) -> Result<Reply, NodeError> {
    let model = args.model.as_path().into();
    let space = commands::tokens(&model, &args.reference, &args.out)?;
    let space = serde_json::to_string(&space).unwrap_or_default();
    Ok(Reply::done(format!("wrote {}", args.out.display())).with("symbol_space", space))
}

fn score(args: &ScoreArgs) -> Result<Reply, NodeError> {
    let items = args.last.map(|last| args.first.unwrap_or(0)..last);
    let shape = RecordShape {
        k: usize::from(args.symbols),
        fill_permille: args.fill_permille,
    };
    let stats = on_threads(args.threads, || {
        let mut terminal = Terminal::new("items");
        let model = commands::ScoredModel {
            place: args.model.as_path().into(),
            chat_template: args.chat_template,
        };
        let (reference, out) = (&args.reference, &args.out);
        let device = args.device;
        commands::score(&model, device, reference, items, &shape, out, &mut terminal)
    })?;
    Ok(Reply::done(format!("wrote {}", args.out.display()))
        .with("shard", args.out.display().to_string())
        .with("positions", stats.positions)
        .with("bits_per_byte", stats.bits_per_byte())
        .with("branches_per_token", stats.branches_per_token()))
}

fn evaluate(args: &EvaluateArgs) -> Result<Reply, NodeError> {
    let adapter = args.adapter.as_deref();
    let score = on_threads(args.threads, || {
        commands::evaluate(
            &args.model,
            adapter,
            args.device,
            &args.data,
            &mut Terminal::new("items"),
        )
    })?;
    Ok(Reply::done(format!("measured {}", args.model.display()))
        .with("bits_per_byte", score.bits_per_byte)
        .with("accuracy", score.accuracy))
}

/// Runs numeric work on a pool of its own size.
pub(crate) fn on_threads<T: Send>(
    threads: Threads,
    work: impl FnOnce() -> Result<T, WorkError> + Send,
) -> Result<T, NodeError> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads.threads.map_or(0, usize::from))
        .build()
        .map_err(|error| NodeError::System {
            doing: "start threads",
            source: std::io::Error::other(error),
        })?;
    Ok(pool.install(work)?)
}

fn init(args: &InitArgs) -> Result<Reply, NodeError> {
    let path = args.out.join("node.toml");
    let text = config::template(&args.consortium, &args.institution, &args.aggregator);
    // Checked before anything is written: a typo must not leave keys behind.
    let parsed = Config::parse(&text, &path)?;
    let identity = parsed.identity.as_path();
    let key_path = identity.join(folder::KEY);
    for existing in [&path, &key_path] {
        if existing.symlink_metadata().is_ok() {
            return Err(NodeError::Exists(existing.clone()));
        }
    }
    pem::create_folder(identity)?;
    let key = TlsKey::generate()?;
    let profile = LeafProfile::node(args.institution.clone());
    let request = leaf::request(&args.consortium, &profile, &key)?;
    let signing = folder::ensure_signing_key(identity)?;
    pem::write_secret(&key_path, &key.to_pem(), Overwrite::Refuse)?;
    let request_path = identity.join(folder::REQUEST);
    pem::write_public(&request_path, &request, Overwrite::Refuse)?;
    pem::write_public(&path, &text, Overwrite::Refuse)?;
    let hint = format!(
        "send {} and the public key to the operator; put cert.pem, ca.pem and authority.pub that come back into {}, \
         and the signed charter at {}",
        request_path.display(),
        identity.display(),
        parsed.charter.display()
    );
    Ok(Reply::done(format!("wrote {}", path.display()))
        .hint(hint)
        .with("config", path.display().to_string())
        .with("request", request_path.display().to_string())
        .with("public_key", signing.public_hex()))
}

fn ledger_of(config: &Config) -> Result<std::path::PathBuf, NodeError> {
    Ok(Spool::open(&config.spool)?.state_path(agent::LEDGER))
}

fn show_ledger(config: &Config) -> Result<Reply, NodeError> {
    let path = ledger_of(config)?;
    let chain = Chain::read(&path)?;
    let lines: Vec<serde_json::Value> = chain
        .lines
        .iter()
        .map(|line| serde_json::to_value(line).unwrap_or_default())
        .collect();
    Ok(head(&path, &chain).with("line", lines))
}

fn verify_ledger(config: &Config) -> Result<Reply, NodeError> {
    let path = ledger_of(config)?;
    match Chain::read(&path).map_err(NodeError::from) {
        Ok(chain) => Ok(head(&path, &chain)),
        Err(error) if error.code() == "NODE-LEDGER-BROKEN" => Ok(Reply::no(&error)),
        Err(error) => Err(error),
    }
}

fn head(path: &Path, chain: &Chain) -> Reply {
    Reply::done(format!("the chain of {} holds", path.display()))
        .with("lines", chain.lines.len())
        .with("head", chain.head.to_string())
}

fn log_to_stderr(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // This crate writes the text that it tokenises, character by character, whatever it is. No RUST_LOG asks for that.
    // Without a hint every such line would be made and carried to this filter, and encoding be several times slower.
    let is_safe = filter_fn(|metadata| !metadata.target().starts_with("tokenizers"))
        .with_max_level_hint(LevelFilter::TRACE);
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(!plain && std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    let lines = lines.with_filter(filter.and(is_safe));
    // Fails only if a program that acts as several has set one already.
    let _ = tracing_subscriber::registry().with(lines).try_init();
}
