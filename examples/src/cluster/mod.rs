//! A consortium on one machine: authority, certificates, charter and configuration files, and its programs as
//! processes on loopback.

mod process;

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use consilium_certs::{Authority, LeafProfile, Overwrite, folder};
use consilium_protocol::charter::{Charter, Member};
use consilium_protocol::manifest::Mode;
use consilium_protocol::time::{Clock, SystemClock};
use consilium_protocol::{ConsortiumId, InstitutionId};

pub use process::{Process, Program, wait_until};

/// One institution's material.
#[derive(Debug, Clone)]
pub struct Site {
    /// Its name.
    pub name: InstitutionId,
    /// Folder of its own model.
    pub source: PathBuf,
    /// Evaluation items that stay at home.
    pub holdout: PathBuf,
    /// Relative training speed; 0 contributes records only.
    pub capacity: u32,
    /// Private text that rounds of mode `adapters` train on; without it the site takes part in none.
    pub train_data: Option<PathBuf>,
}

/// What a consortium is made of.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Name of the consortium.
    pub consortium: ConsortiumId,
    /// Members that a phase needs.
    pub quorum: u32,
    /// See [`Charter::gate_bound_permille`].
    pub gate_bound_permille: u32,
    /// Folder of the shared model.
    pub pivot: PathBuf,
    /// The reference set.
    pub reference: PathBuf,
    /// The members.
    pub sites: Vec<Site>,
    /// Modes that the charter and every site's policy allow.
    pub modes: Vec<Mode>,
    /// Threads of each worker.
    pub threads: usize,
}

/// A prepared consortium: every file that its programs need is below one folder.
#[derive(Debug)]
pub struct Cluster {
    root: PathBuf,
    spec: Spec,
    port: u16,
    aggregator: Program,
    node: Program,
}

impl Cluster {
    /// Makes keys, certificates, the signed charter and the configuration files below `root`.
    ///
    /// # Errors
    /// A file cannot be written, or no port is free.
    pub fn prepare(root: &Path, spec: Spec, aggregator: Program, node: Program) -> Result<Self> {
        fs::create_dir_all(root)?;
        let root = root.canonicalize()?;
        let port = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?
            .local_addr()?
            .port();
        let cluster = Self {
            root,
            spec,
            port,
            aggregator,
            node,
        };
        let now = SystemClock.now();
        let authority = Authority::create(&cluster.spec.consortium, 1, now)?;
        authority.save(&cluster.root.join("authority"), Overwrite::Refuse)?;
        let operator = InstitutionId::new("operator")?;
        let profile = LeafProfile::aggregator(
            operator,
            vec!["localhost".to_owned()],
            vec![Ipv4Addr::LOCALHOST.into()],
        );
        let identity = authority.issue_into(
            &profile,
            &cluster.aggregator_dir().join("identity"),
            now,
            Overwrite::Refuse,
        )?;
        let log_key = identity
            .note_signer(
                &folder::log_key_name(&cluster.spec.consortium),
                consilium_protocol::transcript::key::SignatureKind::Ed25519,
            )?
            .verifier()
            .to_string();
        let members = cluster
            .spec
            .sites
            .iter()
            .map(|site| {
                let dir = cluster.site_dir(&site.name).join("identity");
                let profile = LeafProfile::node(site.name.clone());
                let key = authority.issue_into(&profile, &dir, now, Overwrite::Refuse)?;
                Ok(Member {
                    institution: site.name.clone(),
                    key: key.public_hex(),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let charter = Charter {
            consortium: cluster.spec.consortium.clone(),
            log_key,
            modes: cluster.spec.modes.clone(),
            quorum: cluster.spec.quorum,
            max_symbols: 16,
            gate_bound_permille: cluster.spec.gate_bound_permille,
            members,
        };
        let path = cluster.charter();
        fs::write(
            &path,
            authority
                .sign_charter(&charter.to_text()?, &path)?
                .to_string(),
        )?;
        cluster.write_configs()?;
        Ok(cluster)
    }

    /// Everything is below this folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The aggregator's own folder.
    #[must_use]
    pub fn aggregator_dir(&self) -> PathBuf {
        self.root.join("aggregator")
    }

    /// The aggregator's data: blobs, log, releases.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.aggregator_dir().join("data")
    }

    /// The aggregator's configuration file.
    #[must_use]
    pub fn aggregator_config(&self) -> PathBuf {
        self.aggregator_dir().join("aggregator.toml")
    }

    /// A site's own folder.
    #[must_use]
    pub fn site_dir(&self, name: &InstitutionId) -> PathBuf {
        self.root.join("sites").join(name.as_str())
    }

    /// A site's configuration file.
    #[must_use]
    pub fn node_config(&self, name: &InstitutionId) -> PathBuf {
        self.site_dir(name).join("node.toml")
    }

    /// The signed charter.
    #[must_use]
    pub fn charter(&self) -> PathBuf {
        self.root.join("charter.signed")
    }

    /// Starts the aggregator and waits until it listens.
    ///
    /// # Errors
    /// It ends, or does not listen within a minute.
    pub fn start_aggregator(&self) -> Result<Process> {
        let address = self.data_dir().join("address");
        if address.exists() {
            fs::remove_file(&address)?;
        }
        let config = self.aggregator_config();
        let mut process = self.aggregator.spawn(
            "aggregator",
            ["serve".as_ref(), "--config".as_ref(), config.as_os_str()],
            &self.root.join("logs"),
        )?;
        wait_until("the aggregator listens", Duration::from_secs(60), || {
            process.ensure_running()?;
            Ok(address.exists())
        })?;
        Ok(process)
    }

    /// Starts a site's node, agent and worker.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start_node(&self, name: &InstitutionId) -> Result<Process> {
        let config = self.node_config(name);
        self.node.spawn(
            name.as_str(),
            ["run".as_ref(), "--config".as_ref(), config.as_os_str()],
            &self.root.join("logs"),
        )
    }

    /// Runs an aggregator command to its end and returns what it printed.
    ///
    /// # Errors
    /// It fails; the message holds what it said.
    pub fn operator(&self, arguments: &[&str]) -> Result<String> {
        let config = self.aggregator_config();
        let output = self
            .aggregator
            .command()
            .args(arguments)
            .arg("--config")
            .arg(&config)
            .output()
            .with_context(|| format!("cannot run consilium-aggregator {}", arguments.join(" ")))?;
        ensure!(
            output.status.success(),
            "consilium-aggregator {}: {}\n{}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// `consilium-aggregator status --json`.
    ///
    /// # Errors
    /// The command fails or prints no JSON.
    pub fn status(&self) -> Result<serde_json::Value> {
        let text = self.operator(&["status", "--json"])?;
        serde_json::from_str(&text).with_context(|| format!("status is no JSON: {text}"))
    }

    fn write_configs(&self) -> Result<()> {
        let spec = &self.spec;
        let path = |path: &Path| -> Result<String> {
            let path = path
                .canonicalize()
                .with_context(|| path.display().to_string())?;
            Ok(toml::Value::from(path.to_string_lossy().into_owned()).to_string())
        };
        let consortium = &spec.consortium;
        fs::create_dir_all(self.data_dir())?;
        let text = format!(
            "consortium = \"{consortium}\"\nlisten = \"127.0.0.1:{port}\"\ndata_dir = \"data\"\n\
             identity = \"identity\"\ncharter = \"../charter.signed\"\npivot = {pivot}\nreference = {reference}\n",
            port = self.port,
            pivot = path(&spec.pivot)?,
            reference = path(&spec.reference)?,
        );
        fs::write(self.aggregator_config(), text)?;
        let modes: Vec<_> = spec
            .modes
            .iter()
            .map(|mode| toml::Value::from(mode.name()))
            .collect();
        let modes = toml::Value::from(modes);
        for site in &spec.sites {
            let train = match &site.train_data {
                Some(data) => format!("\n[train]\ndata = [{}]\n", path(data)?),
                None => String::new(),
            };
            let text = format!(
                "consortium = \"{consortium}\"\ninstitution = \"{name}\"\n\
                 aggregator = \"127.0.0.1:{port}\"\nserver_name = \"localhost\"\n\
                 identity = \"identity\"\ncharter = \"../../charter.signed\"\nspool = \"spool\"\n\
                 pivot = {pivot}\nsource = {source}\nholdout = {holdout}\ncapacity = {capacity}\n\n\
                 [policy]\nmodes = {modes}\nmax_symbols = 16\nmax_rounds = 100\nmax_bytes = 1_000_000_000\n\n\
                 [worker]\nthreads = {threads}\n{train}",
                name = site.name,
                port = self.port,
                pivot = path(&spec.pivot)?,
                source = path(&site.source)?,
                holdout = path(&site.holdout)?,
                capacity = site.capacity,
                threads = spec.threads,
            );
            fs::write(self.node_config(&site.name), text)?;
        }
        Ok(())
    }
}
