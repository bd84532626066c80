//! Certificates and requests that must not pass are refused, each for its own reason.

#![cfg(test)]

use std::path::Path;
use std::time::Duration;

use consilium_certs::inspect::{Fault, verify};
use consilium_certs::{Authority, CertsError, LeafProfile, TlsKey, leaf};
use consilium_protocol::{ConsortiumId, InstitutionId, UnixMillis};

/// 2026-01-01T00:00:00Z.
const NOW: UnixMillis = UnixMillis(1_767_225_600_000);

fn authority(name: &str) -> Authority {
    Authority::create(&ConsortiumId::new(name).unwrap(), 10, NOW).unwrap()
}

fn node(name: &str) -> LeafProfile {
    LeafProfile::node(InstitutionId::new(name).unwrap())
}

fn days(count: u64) -> Duration {
    Duration::from_secs(count * 86_400)
}

fn faults(certificate: &str, authority: &str, now: UnixMillis) -> Vec<Fault> {
    verify(
        (certificate, Path::new("cert.pem")),
        (authority, Path::new("ca.pem")),
        now,
    )
    .unwrap()
}

#[test]
fn a_certificate_is_good_from_issue_to_its_last_day() {
    let authority = authority("demo");
    let certificate = authority.issue(&node("st-anna"), NOW).unwrap().certificate;
    let at = |now| faults(&certificate, authority.certificate(), now);
    assert_eq!(at(NOW), []);
    assert_eq!(at(NOW.after(days(90))), []);
    let late = at(NOW.after(days(90) + Duration::from_secs(1)));
    assert!(matches!(late.as_slice(), [Fault::Expired(_)]), "{late:?}");
    let early = at(UnixMillis(NOW.0 - 3_600_000));
    assert!(
        matches!(
            early.as_slice(),
            [Fault::AuthorityExpired, Fault::NotYetValid(_)]
        ),
        "{early:?}"
    );
}

#[test]
fn a_certificate_of_another_authority_is_recognised_even_under_the_same_name() {
    let certificate = authority("demo")
        .issue(&node("st-anna"), NOW)
        .unwrap()
        .certificate;
    for other in [authority("demo"), authority("rival")] {
        let found = faults(&certificate, other.certificate(), NOW);
        assert!(
            matches!(found.first(), Some(Fault::WrongAuthority { .. })),
            "{found:?}"
        );
    }
}

#[test]
fn the_authority_itself_is_no_member_and_a_member_is_no_authority() {
    let authority = authority("demo");
    let member = authority.issue(&node("st-anna"), NOW).unwrap().certificate;
    let itself = faults(authority.certificate(), authority.certificate(), NOW);
    assert_eq!(itself, [Fault::IsAuthority]);
    let found = faults(&member, &member, NOW);
    assert!(found.contains(&Fault::NotAnAuthority), "{found:?}");
}

#[test]
fn every_flipped_bit_of_a_certificate_is_noticed() {
    let authority = authority("demo");
    let text = authority.issue(&node("st-anna"), NOW).unwrap().certificate;
    for at in 0..text.len() {
        let mut bytes = text.clone().into_bytes();
        bytes[at] ^= 1;
        // Line ends and armour carry nothing that is signed.
        let line = text.bytes().take(at).filter(|byte| *byte == b'\n').count();
        let in_body = text.as_bytes()[at] != b'\n' && line > 0 && line + 1 < text.lines().count();
        let Ok(changed) = String::from_utf8(bytes) else {
            continue;
        };
        let ca = (authority.certificate(), Path::new("ca.pem"));
        let verdict = verify((&changed, Path::new("cert.pem")), ca, NOW);
        let passed = verdict.is_ok_and(|faults| faults.is_empty());
        assert!(!(in_body && passed), "byte {at} of\n{text}");
    }
}

#[test]
fn a_request_is_certified_for_the_approved_identity_only() {
    let authority = authority("demo");
    let consortium = authority.consortium();
    let key = TlsKey::generate().unwrap();
    let path = Path::new("request.pem");
    let sign =
        |request: &str, profile: &LeafProfile| authority.sign_request(request, path, profile, NOW);
    let request = leaf::request(consortium, &node("st-anna"), &key).unwrap();
    let certificate = sign(&request, &node("st-anna")).unwrap();
    assert_eq!(faults(&certificate, authority.certificate(), NOW), []);

    assert!(matches!(
        sign(&request, &node("bank-9")),
        Err(CertsError::RequestIdentity { .. })
    ));
    let elsewhere = ConsortiumId::new("rival").unwrap();
    let foreign = leaf::request(&elsewhere, &node("st-anna"), &key).unwrap();
    assert!(matches!(
        sign(&foreign, &node("st-anna")),
        Err(CertsError::RequestIdentity { .. })
    ));

    let aggregator = |dns: &[&str]| {
        let dns = dns.iter().map(|name| (*name).to_owned()).collect();
        LeafProfile::aggregator(InstitutionId::new("op").unwrap(), dns, vec![])
    };
    let greedy = leaf::request(consortium, &aggregator(&["a.example", "b.example"]), &key).unwrap();
    let refused = sign(&greedy, &aggregator(&["a.example"]));
    assert!(matches!(refused, Err(CertsError::RequestName(name)) if name == "b.example"));
    sign(&greedy, &aggregator(&["b.example", "a.example"])).unwrap();
}

#[test]
fn a_request_that_was_altered_or_has_another_kind_of_key_is_refused() {
    let authority = authority("demo");
    let path = Path::new("request.pem");
    let params = {
        let mut params = rcgen::CertificateParams::default();
        let uri = "consilium://demo/node/st-anna".try_into().unwrap();
        params.subject_alt_names = vec![rcgen::SanType::URI(uri)];
        params
    };
    let p384 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    let request = params.serialize_request(&p384).unwrap().pem().unwrap();
    let refused = authority.sign_request(&request, path, &node("st-anna"), NOW);
    assert!(
        matches!(refused, Err(CertsError::RequestKey)),
        "{refused:?}"
    );

    let key = TlsKey::generate().unwrap();
    let good = leaf::request(authority.consortium(), &node("st-anna"), &key).unwrap();
    let body = good.lines().nth(1).unwrap();
    let altered = good.replace(body, &body.replacen('A', "B", 1));
    assert_ne!(altered, good);
    for text in ["", "nonsense", altered.as_str(), authority.certificate()] {
        let refused = authority.sign_request(text, path, &node("st-anna"), NOW);
        assert!(
            matches!(refused, Err(CertsError::Malformed { .. })),
            "{refused:?}"
        );
    }
}

#[test]
fn no_certificate_outlives_its_authority() {
    let consortium = ConsortiumId::new("demo").unwrap();
    let authority = Authority::create(&consortium, 1, NOW).unwrap();
    let late = NOW.after(days(300));
    let refused = authority.issue(&node("st-anna"), late);
    assert!(
        matches!(refused, Err(CertsError::OutlivesAuthority { days: 90 })),
        "{refused:?}"
    );
    let mut short = node("st-anna");
    short.days = 60;
    authority.issue(&short, late).unwrap();
}

#[test]
fn renewals_of_one_key_have_different_serial_numbers() {
    let authority = authority("demo");
    let key = TlsKey::generate().unwrap();
    let request = leaf::request(authority.consortium(), &node("st-anna"), &key).unwrap();
    let serial = || {
        let path = Path::new("request.pem");
        let text = authority
            .sign_request(&request, path, &node("st-anna"), NOW)
            .unwrap();
        consilium_certs::inspect::CertificateView::parse(&text, path)
            .unwrap()
            .serial
    };
    assert_ne!(serial(), serial());
}
