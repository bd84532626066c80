//! Sequences of tokens side by side: dynamic time warping over edit distances (FuseLLM, arXiv 2401.10491).

/// Insertions, deletions and replacements that make `b` of `a` (Levenshtein 1966).
#[must_use]
pub fn edit_distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, y) in row.iter_mut().skip(1).zip(b) {
            let replaced = diagonal + usize::from(x != y);
            diagonal = *cell;
            left = replaced.min(left + 1).min(*cell + 1);
            *cell = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

/// For each token of `own` the place of its partner in `source`: the only one beside it on the cheapest path, and then only if
/// `alike` says that the two (place in `own`, place in `source`) are the same token.
#[must_use]
pub fn partners(
    own: &[&[u8]],
    source: &[&[u8]],
    alike: impl Fn(usize, usize) -> bool,
) -> Vec<Option<usize>> {
    warp(own, source)
        .into_iter()
        .enumerate()
        .map(|(place, beside)| match beside[..] {
            [only] if alike(place, only) => Some(only),
            _ => None,
        })
        .collect()
}

/// Places in `source` that lie beside each token of `own` on the cheapest path, ascending; a step in both where that is as
/// cheap as another, and else in `source` before `own`.
fn warp(own: &[&[u8]], source: &[&[u8]]) -> Vec<Vec<usize>> {
    let mut beside = vec![Vec::new(); own.len()];
    if own.is_empty() || source.is_empty() {
        return beside;
    }
    let costs = costs(own, source);
    let width = source.len() + 1;
    let (mut i, mut j) = (own.len(), source.len());
    loop {
        beside[i - 1].push(j - 1);
        if (i, j) == (1, 1) {
            break;
        }
        let back = [(i - 1, j - 1), (i, j - 1), (i - 1, j)];
        let cheapest = back.into_iter().min_by_key(|&(i, j)| costs[i * width + j]);
        (i, j) = cheapest.unwrap_or((1, 1));
    }
    for places in &mut beside {
        places.reverse();
    }
    beside
}

/// Costs of the cheapest paths to each pair, with a border that no path crosses.
fn costs(own: &[&[u8]], source: &[&[u8]]) -> Vec<usize> {
    let width = source.len() + 1;
    let mut costs = vec![usize::MAX; (own.len() + 1) * width];
    costs[0] = 0;
    for (i, a) in (1..).zip(own) {
        for (j, b) in (1..).zip(source) {
            let before = [(i - 1, j), (i, j - 1), (i - 1, j - 1)];
            let before = before.map(|(i, j)| costs[i * width + j]);
            let least = before.into_iter().min().unwrap_or_default();
            costs[i * width + j] = least.saturating_add(difference(a, b));
        }
    }
    costs
}

/// Edit distance without spaces, which stand for the mark of a word's beginning; the end is unlike all else.
fn difference(a: &[u8], b: &[u8]) -> usize {
    if a.is_empty() != b.is_empty() {
        return a.len().max(b.len());
    }
    let words = |token: &[u8]| -> Vec<u8> {
        let bytes = token.iter().copied();
        bytes.filter(|byte| *byte != b' ').collect()
    };
    edit_distance(&words(a), &words(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes<'a>(tokens: &[&'a str]) -> Vec<&'a [u8]> {
        tokens.iter().map(|token| token.as_bytes()).collect()
    }

    /// Partners that spell the same.
    fn equal(own: &[&str], source: &[&str]) -> Vec<Option<usize>> {
        partners(&bytes(own), &bytes(source), |i, j| own[i] == source[j])
    }

    #[test]
    fn distances_count_edits() {
        for (a, b, distance) in [
            ("", "", 0),
            ("", "abc", 3),
            ("abc", "", 3),
            ("kitten", "sitting", 3),
            ("kavo", "kavo", 0),
            ("ab", "ba", 2),
            ("abc", "ac", 1),
        ] {
            assert_eq!(
                edit_distance(a.as_bytes(), b.as_bytes()),
                distance,
                "{a} {b}"
            );
        }
    }

    #[test]
    fn the_same_tokens_are_partners_one_by_one() {
        let tokens = ["ref", " kavo", " ->", " use", " dolin", ".", ""];
        let all: Vec<Option<usize>> = (0..7).map(Some).collect();
        assert_eq!(equal(&tokens, &tokens), all);
        assert!(equal(&[], &tokens).is_empty());
        assert_eq!(equal(&tokens[..1], &[]), [None]);
    }

    #[test]
    fn a_token_that_the_source_splits_has_no_partner_and_its_neighbours_keep_theirs() {
        let own = ["ref", " kavo", " use", ""];
        let source = ["ref", " ka", "vo", " use", ""];
        assert_eq!(warp(&bytes(&own), &bytes(&source))[1], [1, 2]);
        assert_eq!(equal(&own, &source), [Some(0), None, Some(3), Some(4)]);
        // The other way both halves lie beside the whole, and neither is it.
        let halves = warp(&bytes(&source), &bytes(&own));
        assert_eq!(halves, [vec![0], vec![1], vec![1], vec![2], vec![3]]);
        let back = equal(&source, &own);
        assert_eq!(back, [Some(0), None, None, Some(2), Some(3)]);
    }

    #[test]
    fn what_counts_as_alike_is_the_callers_to_say() {
        let (own, source) = (bytes(&["kavo", ""]), bytes(&["kavos", ""]));
        assert_eq!(partners(&own, &source, |_, _| true), [Some(0), Some(1)]);
        assert_eq!(partners(&own, &source, |_, _| false), [None, None]);
    }
}
