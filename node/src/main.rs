//! The program at an institution: models, training, scoring, egress gate, session.

fn main() {}
