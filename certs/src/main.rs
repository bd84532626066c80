//! Consortium certificate authority, node certificates and signing keys.

fn main() {}
