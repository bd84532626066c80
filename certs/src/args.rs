//! Commands and options of the program.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use consilium_protocol::{ConsortiumId, InstitutionId};

use crate::authority::DEFAULT_YEARS;
use consilium_protocol::Role;

use crate::leaf::{DEFAULT_DAYS, LeafProfile};

/// Keys and certificates of a consortium.
#[derive(Debug, Parser)]
#[command(
    name = "consilium-certs",
    version,
    about,
    arg_required_else_help = true
)]
pub(crate) struct Cli {
    /// Print one JSON object instead of lines.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Replace files that exist; a signing key is kept all the same.
    #[arg(long, global = true)]
    pub(crate) force: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make the authority of a new consortium.
    Init {
        /// Name of the consortium: a-z, 0-9 and '-'.
        #[arg(long)]
        consortium: ConsortiumId,
        /// Folder to make.
        #[arg(long)]
        out: PathBuf,
        /// Validity in years.
        #[arg(long, default_value_t = DEFAULT_YEARS)]
        years: u32,
    },
    /// Make key, certificate and signing key in one place; for demonstrations.
    Issue {
        #[command(flatten)]
        holder: Holder,
        /// Validity in days.
        #[arg(long, default_value_t = DEFAULT_DAYS)]
        days: u32,
        /// Folder of the authority.
        #[arg(long)]
        authority: PathBuf,
        /// Folder of the member.
        #[arg(long)]
        out: PathBuf,
    },
    /// At the site: make the keys and a request for the authority. The keys stay.
    Request {
        #[command(flatten)]
        holder: Holder,
        /// Name of the consortium.
        #[arg(long)]
        consortium: ConsortiumId,
        /// Folder of the member.
        #[arg(long)]
        out: PathBuf,
        /// Renewal: request a certificate for the key that is there, which stays in use meanwhile.
        #[arg(long)]
        keep_key: bool,
    },
    /// At the authority: certify a request for the identity given here.
    Sign {
        #[command(flatten)]
        holder: Holder,
        /// The request.
        #[arg(long)]
        request: PathBuf,
        /// Validity in days.
        #[arg(long, default_value_t = DEFAULT_DAYS)]
        days: u32,
        /// Folder of the authority.
        #[arg(long)]
        authority: PathBuf,
        /// Folder for what goes back to the site.
        #[arg(long)]
        out: PathBuf,
    },
    /// Make or show an ed25519 signing key.
    Identity {
        #[command(subcommand)]
        command: IdentityCommand,
    },
    /// Show what a certificate says.
    Show {
        /// The certificate, PEM.
        file: PathBuf,
    },
    /// Check a member's certificate; exit status 1 if it is not good.
    Verify {
        /// Folder with the authority's ca.pem; a member's folder has it too.
        #[arg(long)]
        authority: PathBuf,
        /// The certificate, PEM.
        file: PathBuf,
    },
    /// Sign or check a charter.
    Charter {
        #[command(subcommand)]
        command: CharterCommand,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum IdentityCommand {
    /// Make a key.
    New {
        /// Key file to write.
        #[arg(long)]
        out: PathBuf,
    },
    /// Show the public half.
    Show {
        /// The key file.
        file: PathBuf,
        /// Also print the verifier key under this name, for example `demo/log`.
        #[arg(long)]
        name: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum CharterCommand {
    /// Sign a charter with the authority's key.
    Sign {
        /// Folder of the authority.
        #[arg(long)]
        authority: PathBuf,
        /// The charter, TOML.
        #[arg(long)]
        charter: PathBuf,
        /// Signed charter to write.
        #[arg(long)]
        out: PathBuf,
    },
    /// Check a signed charter; exit status 1 if it is not good.
    Verify {
        /// Folder with authority.pub; a member's folder has it too.
        #[arg(long)]
        authority: PathBuf,
        /// The signed charter.
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Holder {
    /// What the holder does.
    role: RoleArg,
    /// The institution: a-z, 0-9 and '-'.
    #[arg(long)]
    institution: InstitutionId,
    /// Host name that nodes dial; aggregator only, may be repeated.
    #[arg(long)]
    dns: Vec<String>,
    /// Address that nodes dial; aggregator only, may be repeated.
    #[arg(long)]
    ip: Vec<IpAddr>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum RoleArg {
    Node,
    Aggregator,
}

impl Holder {
    /// The certificate asked for.
    pub(crate) fn profile(self, days: u32) -> LeafProfile {
        let role = match self.role {
            RoleArg::Node => Role::Node,
            RoleArg::Aggregator => Role::Aggregator,
        };
        LeafProfile {
            role,
            institution: self.institution,
            dns: self.dns,
            ip: self.ip,
            days,
        }
    }
}
