//! The four institutions: the world's three domains, of which one has two institutions.
//!
//! Of the facts that nobody outside of the domain knows, a third is known to the first of the two alone, a third to the
//! second alone, and a third to both; one that another domain knows as well goes to one of them. So a fact has one or two
//! owners, formats and lexicon are everybody's, and two institutions are competent for the same items.

use consilium_examples::world::{Domain, World};

/// Names of the institutions, ascending, as in every list of contributions.
pub(crate) const NAMES: [&str; 4] = ["bank", "clinic", "hospital", "insurer"];

/// The private text of each institution, in the order of [`NAMES`].
pub(crate) fn private(world: &World) -> [Vec<String>; 4] {
    let of = |domain: Domain| &world.institutions[domain.index()].private;
    let shared: Vec<&str> = world
        .tests
        .facts
        .iter()
        .filter(|fact| fact.also.is_some())
        .filter_map(|fact| key(&fact.item.context))
        .collect();
    let mut keys: Vec<&str> = of(Domain::Clinic)
        .iter()
        .filter_map(|line| key(line))
        .collect();
    keys.sort_unstable();
    keys.dedup();
    let mut halves = [Vec::new(), Vec::new()];
    for (at, line) in of(Domain::Clinic).iter().enumerate() {
        let owners = match key(line).and_then(|key| Some((key, keys.binary_search(&key).ok()?))) {
            Some((key, rank)) if shared.contains(&key) => [rank % 2 == 0, rank % 2 == 1],
            Some((_, rank)) => [rank % 3 != 1, rank % 3 != 0],
            None => [at % 2 == 0, at % 2 == 1],
        };
        for (half, owns) in halves.iter_mut().zip(owners) {
            if owns {
                half.push(line.clone());
            }
        }
    }
    let [clinic, hospital] = halves;
    [
        of(Domain::Bank).clone(),
        clinic,
        hospital,
        of(Domain::Insurer).clone(),
    ]
}

/// The private text of a fifth institution: one line in four of everybody's.
pub(crate) fn mixed(world: &World) -> Vec<String> {
    let all = private(world).into_iter().flatten();
    all.step_by(NAMES.len()).collect()
}

/// The key of a fact's line.
fn key(line: &str) -> Option<&str> {
    line.strip_prefix("ref ")?.split(' ').next()
}
