//! The program `consilium-certs`: stdout is the result, stderr is talk.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser as _;
use consilium_protocol::charter::Charter;
use consilium_protocol::time::SystemClock;
use consilium_protocol::transcript::{SignatureKind, SignedNote};
use consilium_protocol::{Clock as _, ConsortiumId};
use serde_json::{Value, json};

use crate::args::{CharterCommand, Cli, Command, IdentityCommand};
use crate::authority::Authority;
use crate::error::CertsError;
use crate::folder;
use crate::identity::SigningIdentity;
use crate::inspect::{self, CertificateView};
use crate::leaf::{self, DEFAULT_DAYS, LeafProfile, TlsKey};
use crate::pem::{self, Overwrite};
use crate::reply::Reply;
use consilium_protocol::Role;

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
    let json = cli.json;
    let reply = run(cli).unwrap_or_else(|error| Reply::failed(&error));
    reply.print(json);
    ExitCode::from(reply.status())
}

fn run(cli: Cli) -> Result<Reply, CertsError> {
    let overwrite = if cli.force {
        Overwrite::Replace
    } else {
        Overwrite::Refuse
    };
    match cli.command {
        Command::Init {
            consortium,
            out,
            years,
        } => init(&consortium, years, &out, overwrite),
        Command::Issue {
            holder,
            days,
            authority,
            out,
        } => issue(&holder.profile(days), &authority, &out, overwrite),
        Command::Request {
            holder,
            consortium,
            out,
            keep_key,
        } => {
            let profile = holder.profile(DEFAULT_DAYS);
            request(&consortium, &profile, &out, keep_key, overwrite)
        }
        Command::Sign {
            holder,
            request,
            days,
            authority,
            out,
        } => sign(&holder.profile(days), &request, &authority, &out, overwrite),
        Command::Identity {
            command: IdentityCommand::New { out },
        } => {
            let identity = SigningIdentity::generate()?;
            identity.save(&out, overwrite)?;
            Ok(Reply::done(format!("wrote {}", out.display()))
                .with("public_key", identity.public_hex()))
        }
        Command::Identity {
            command: IdentityCommand::Show { file, name },
        } => {
            let identity = SigningIdentity::load(&file)?;
            let mut reply = Reply::done(format!("signing key {}", file.display()))
                .with("public_key", identity.public_hex());
            if let Some(name) = name {
                let signer = identity.note_signer(&name, SignatureKind::Ed25519)?;
                reply = reply.with("verifier_key", signer.verifier().to_string());
            }
            Ok(reply)
        }
        Command::Show { file } => {
            let view = CertificateView::parse(&pem::read_public(&file)?, &file)?;
            Ok(describe(
                Reply::done(format!("certificate {}", file.display())),
                &view,
            ))
        }
        Command::Verify { authority, file } => verify(&authority, &file),
        Command::Charter { command } => match command {
            CharterCommand::Sign {
                authority,
                charter,
                out,
            } => sign_charter(&authority, &charter, &out, overwrite),
            CharterCommand::Verify { authority, file } => verify_charter(&authority, &file),
        },
    }
}

fn init(
    consortium: &ConsortiumId,
    years: u32,
    out: &Path,
    overwrite: Overwrite,
) -> Result<Reply, CertsError> {
    let authority = Authority::create(consortium, years, SystemClock.now())?;
    authority.save(out, overwrite)?;
    Ok(Reply::done(format!(
        "made the authority of {consortium} in {}",
        out.display()
    ))
    .hint(format!(
        "keep {} and {} offline and backed up: who has them can admit members",
        out.join(folder::CA_KEY).display(),
        out.join(folder::AUTHORITY_KEY).display()
    ))
    .with("authority_key", authority.verifier_key().to_string()))
}

fn issue(
    profile: &LeafProfile,
    authority: &Path,
    out: &Path,
    overwrite: Overwrite,
) -> Result<Reply, CertsError> {
    let authority = Authority::load(authority)?;
    let signing = authority.issue_into(profile, out, SystemClock.now(), overwrite)?;
    let message = format!(
        "issued a certificate for {} days in {}",
        profile.days,
        out.display()
    );
    member_reply(message, authority.consortium(), profile, &signing)
}

fn request(
    consortium: &ConsortiumId,
    profile: &LeafProfile,
    out: &Path,
    keep_key: bool,
    overwrite: Overwrite,
) -> Result<Reply, CertsError> {
    let (key_path, request_path) = (out.join(folder::KEY), out.join(folder::REQUEST));
    let key = if keep_key {
        TlsKey::from_pem(&pem::read_secret(&key_path)?, &key_path)?
    } else {
        pem::check_absent(std::slice::from_ref(&key_path), overwrite)?;
        TlsKey::generate()?
    };
    let request = leaf::request(consortium, profile, &key)?;
    pem::create_folder(out)?;
    let signing = folder::ensure_signing_key(out)?;
    if !keep_key {
        pem::write_secret(&key_path, &key.to_pem(), overwrite)?;
    }
    pem::write_public(&request_path, &request, Overwrite::Replace)?;
    let message = format!("wrote {}", request_path.display());
    Ok(member_reply(message, consortium, profile, &signing)?
        .hint("send the request and the public key to the operator; the key files stay here"))
}

fn sign(
    profile: &LeafProfile,
    request: &Path,
    authority: &Path,
    out: &Path,
    overwrite: Overwrite,
) -> Result<Reply, CertsError> {
    let authority = Authority::load(authority)?;
    let text = pem::read_public(request)?;
    let certificate = authority.sign_request(&text, request, profile, SystemClock.now())?;
    let path = out.join(folder::CERTIFICATE);
    pem::check_absent(std::slice::from_ref(&path), overwrite)?;
    pem::create_folder(out)?;
    pem::write_public(&path, &certificate, overwrite)?;
    authority.write_trust(out)?;
    Ok(Reply::done(format!(
        "certified {} for {} days",
        request.display(),
        profile.days
    ))
    .hint(format!("send the files in {} to the site", out.display()))
    .with(
        "identity",
        profile.identity(authority.consortium()).to_string(),
    )
    .with("certificate", path.display().to_string()))
}

fn verify(authority: &Path, file: &Path) -> Result<Reply, CertsError> {
    let ca_path = authority.join(folder::CA);
    let (text, ca) = (pem::read_public(file)?, pem::read_public(&ca_path)?);
    let faults = inspect::verify((&text, file), (&ca, &ca_path), SystemClock.now())?;
    let view = CertificateView::parse(&text, file)?;
    let Some(first) = faults.first() else {
        return Ok(describe(
            Reply::done(format!("{} is good", file.display())),
            &view,
        ));
    };
    let faults: Vec<Value> = faults
        .iter()
        .map(|fault| json!({"code": fault.code(), "message": fault.to_string()}))
        .collect();
    let reply = Reply::no(first.code(), format!("{}: {first}", file.display()));
    Ok(describe(reply.with("faults", faults), &view))
}

fn sign_charter(
    authority: &Path,
    charter: &Path,
    out: &Path,
    overwrite: Overwrite,
) -> Result<Reply, CertsError> {
    let authority = Authority::load(authority)?;
    let note = authority.sign_charter(&pem::read_public(charter)?, charter)?;
    pem::write_public(out, &note.to_string(), overwrite)?;
    Ok(Reply::done(format!("signed {}", charter.display()))
        .with("charter", out.display().to_string())
        .with("signed_by", authority.verifier_key().to_string()))
}

fn verify_charter(authority: &Path, file: &Path) -> Result<Reply, CertsError> {
    let key = folder::read_verifier_key(&authority.join(folder::AUTHORITY_PUBLIC))?;
    let text = pem::read_public(file)?;
    let note =
        SignedNote::parse(text.as_bytes()).and_then(|note| note.verify(std::slice::from_ref(&key)));
    let note = match note {
        Ok(note) => note,
        Err(error) => {
            let message = format!("{}: {error}", file.display());
            let reply = Reply::no("CHARTER-NOT-VERIFIED", message);
            return Ok(reply.with("expected_key", key.to_string()));
        }
    };
    let charter = Charter::parse(note.text()).map_err(|source| CertsError::Charter {
        path: file.to_owned(),
        source,
    })?;
    let members: Vec<Value> = charter
        .members
        .iter()
        .map(|member| member.institution.as_str().into())
        .collect();
    Ok(Reply::done(format!("{} is good", file.display()))
        .with("consortium", charter.consortium.as_str())
        .with("members", members)
        .with("signed_by", key.to_string()))
}

fn member_reply(
    message: String,
    consortium: &ConsortiumId,
    profile: &LeafProfile,
    signing: &SigningIdentity,
) -> Result<Reply, CertsError> {
    let reply = Reply::done(message)
        .with("identity", profile.identity(consortium).to_string())
        .with("public_key", signing.public_hex());
    if profile.role == Role::Node {
        return Ok(reply);
    }
    let signer = signing.note_signer(&folder::log_key_name(consortium), SignatureKind::Ed25519)?;
    Ok(reply.with("log_key", signer.verifier().to_string()))
}

fn describe(reply: Reply, view: &CertificateView) -> Reply {
    let usage = [
        (view.client_auth, "clientAuth"),
        (view.server_auth, "serverAuth"),
    ];
    let usage: Vec<&str> = usage
        .iter()
        .filter(|(has, _)| *has)
        .map(|(_, name)| *name)
        .collect();
    let ip: Vec<String> = view.ip.iter().map(ToString::to_string).collect();
    reply
        .with("subject", view.subject.as_str())
        .with("issuer", view.issuer.as_str())
        .with("serial", view.serial.as_str())
        .with("uri", view.uris.clone())
        .with("dns", view.dns.clone())
        .with("ip", ip)
        .with("not_before", inspect::date(view.not_before))
        .with("not_after", inspect::date(view.not_after))
        .with("extended_key_usage", usage)
        .with("authority", view.is_ca)
        .with("p256", view.is_p256)
        .with("spki_sha256", view.spki_sha256.to_string())
}
