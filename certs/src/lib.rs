//! Consortium certificate authority, node certificates and signing keys.

#![forbid(unsafe_code)]
