//! Who takes part: `consilium://<consortium>/<node|aggregator>/<institution>`, the URI in a certificate's subject alternative
//! name (RFC 5280, section 4.2.1.6).

use std::fmt;
use std::str::FromStr;

use crate::ids::{ConsortiumId, InstitutionId};

/// What the holder of a certificate does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Dials the aggregator.
    Node,
    /// Serves the nodes.
    Aggregator,
}

impl Role {
    /// The word in the identity's URI.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Aggregator => "aggregator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A party to a consortium, as its certificate says.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerIdentity {
    /// Its consortium.
    pub consortium: ConsortiumId,
    /// What it does.
    pub role: Role,
    /// Its institution.
    pub institution: InstitutionId,
}

/// A text that is no identity; holds its first 200 characters.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not consilium://<consortium>/<node|aggregator>/<institution>")]
pub struct NoIdentity(pub String);

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            consortium,
            role,
            institution,
        } = self;
        write!(f, "consilium://{consortium}/{role}/{institution}")
    }
}

impl FromStr for PeerIdentity {
    type Err = NoIdentity;

    fn from_str(text: &str) -> Result<Self, NoIdentity> {
        let parse = || {
            let mut parts = text.strip_prefix("consilium://")?.split('/');
            let consortium = parts.next()?.parse().ok()?;
            let role = match parts.next()? {
                "node" => Role::Node,
                "aggregator" => Role::Aggregator,
                _ => return None,
            };
            let institution = parts.next()?.parse().ok()?;
            parts.next().is_none().then_some(Self {
                consortium,
                role,
                institution,
            })
        };
        parse().ok_or_else(|| NoIdentity(text.chars().take(200).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_read_back_and_others_are_refused() {
        let text = "consilium://demo/node/st-anna";
        assert_eq!(text.parse::<PeerIdentity>().unwrap().to_string(), text);
        for bad in [
            "",
            "https://demo/node/st-anna",
            "consilium://demo/node",
            "consilium://demo/node/st-anna/",
            "consilium://demo/admin/st-anna",
            "consilium://demo/Node/st-anna",
            "consilium://demo/node/St-Anna",
            "consilium:///node/st-anna",
            "consilium://demo/node/st-anna?x",
        ] {
            assert!(bad.parse::<PeerIdentity>().is_err(), "{bad:?} was accepted");
        }
    }
}
