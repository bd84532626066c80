//! What protects a merge: a share and a scale for every member, from the inner products of the updates alone.
//!
//! With tau_m the whole update of a member (all products and whole modules minus those of the start) and `G[i, j] = <tau_i,
//! tau_j>`, every norm, distance and cosine follows from G; the merge is then the same weighted sum of low-rank products as
//! without a defence. Sources stand at the variants of [`Defence`].

use consilium_protocol::manifest::{Defence, MergeRule};

/// A member whose norm is below this share of the median norm sent no update.
const NO_UPDATE: f64 = 1e-3;
/// Updates with a higher cosine, and norms that differ by less than the same, are copies of each other.
const COPY: f64 = 0.9999;
/// Updates with a higher cosine may come from one text, see [`Gram::alike`].
const ALIKE: f64 = 0.8;
/// Where the median pair has a higher cosine, everybody is alike.
const DIFFERENT: f64 = 0.6;
/// Steps of the geometric median within [`Defence::Standard`].
const STEPS: u32 = 8;
/// Smallest distance in a Weiszfeld step in units of the median norm.
const SMOOTHING: f64 = 1e-6;

/// Inner products of the members' updates, `[members, members]` row-major and symmetric.
#[derive(Debug, Clone, PartialEq)]
pub struct Gram {
    members: usize,
    values: Vec<f64>,
}

/// How much a member counts: its update times `scale`, with weight `share`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Vote {
    /// 0 where the member is left out; the shares of all sum to one.
    pub share: f64,
    /// From 0 to 1, but for centred clipping, where it may be larger.
    pub scale: f64,
    /// Why it is left out.
    pub excluded: Option<Exclusion>,
}

/// Why a member does not count, or is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exclusion {
    /// Its adapter is the start's, or nearly: less than a thousandth of the median norm.
    NoUpdate,
    /// Its update is that of the member with this index, which comes before it.
    CopyOf(usize),
    /// Others lie closer to their neighbours (multi-Krum).
    FarFromOthers,
}

/// What a defence decided.
#[derive(Debug, Clone, PartialEq)]
pub struct Votes {
    /// One per member.
    pub votes: Vec<Vote>,
    /// Values of every entry that are left out at each end; 0 without a trimmed mean.
    pub trimmed: usize,
}

impl Gram {
    /// `None` where `values` are not `members * members`, or one is not finite.
    #[must_use]
    pub fn new(members: usize, values: Vec<f64>) -> Option<Self> {
        let square = members.checked_mul(members) == Some(values.len());
        (square && values.iter().all(|value| value.is_finite())).then_some(Self { members, values })
    }

    /// `<tau_i, tau_j>`; 0 for a member that is not there.
    #[must_use]
    pub fn inner(&self, i: usize, j: usize) -> f64 {
        let value = self.values.get(i * self.members + j);
        value.copied().filter(|_| j < self.members).unwrap_or(0.0)
    }

    /// Frobenius norm of an update.
    #[must_use]
    pub fn norm(&self, i: usize) -> f64 {
        self.inner(i, i).max(0.0).sqrt()
    }

    /// Cosine of two updates; 0 where one is zero.
    #[must_use]
    pub fn cosine(&self, i: usize, j: usize) -> f64 {
        let norms = self.norm(i) * self.norm(j);
        if norms > 0.0 {
            (self.inner(i, j) / norms).clamp(-1.0, 1.0)
        } else {
            0.0
        }
    }

    /// Members.
    #[must_use]
    pub const fn members(&self) -> usize {
        self.members
    }

    /// `|tau_i - sum c_m tau_m|` of every member.
    fn distances(&self, c: &[f64]) -> Vec<f64> {
        let dot = |i: usize| (0..c.len()).map(|j| c[j] * self.inner(i, j)).sum();
        let inner: Vec<f64> = (0..self.members).map(dot).collect();
        let centre: f64 = inner.iter().zip(c).map(|(inner, c)| inner * c).sum();
        let squared = |i: usize| self.inner(i, i) - 2.0 * inner[i] + centre;
        (0..self.members)
            .map(|i| squared(i).max(0.0).sqrt())
            .collect()
    }

    /// The norm in the middle, the lower of two.
    fn median_norm(&self, of: impl Iterator<Item = usize>) -> f64 {
        let mut norms: Vec<f64> = of.map(|i| self.norm(i)).collect();
        norms.sort_by(f64::total_cmp);
        let middle = norms.len().saturating_sub(1) / 2;
        norms.get(middle).copied().unwrap_or(0.0)
    }

    /// Members that sent nothing of their own: free riders, and all but the first of near-duplicates. Who of these copied is
    /// not known, and leaving out the later one changes nothing but the weight.
    #[must_use]
    pub fn suspects(&self) -> Vec<Option<Exclusion>> {
        let least = NO_UPDATE * self.median_norm(0..self.members);
        let mut suspects = vec![None; self.members];
        for i in 0..self.members {
            let (norm, idle) = (self.norm(i), suspects.clone());
            let is_copy = |j: &usize| {
                let close = (self.norm(*j) - norm).abs() <= (1.0 - COPY) * norm;
                idle.get(*j) == Some(&None) && close && self.cosine(i, *j) > COPY
            };
            suspects[i] = if norm < least {
                Some(Exclusion::NoUpdate)
            } else {
                (0..i).find(is_copy).map(Exclusion::CopyOf)
            };
        }
        suspects
    }

    /// For each of `members`, those of them whose updates have nearly its direction although the members in general have not: a
    /// cosine above .8 where that of the median pair is below .6. They may come from one text.
    #[must_use]
    pub fn alike(&self, members: &[usize]) -> Vec<Vec<usize>> {
        let pairs = members.iter().enumerate().flat_map(|(at, &i)| {
            let later = members[at + 1..].iter();
            later.map(move |&j| self.cosine(i, j))
        });
        let mut cosines: Vec<f64> = pairs.collect();
        cosines.sort_by(f64::total_cmp);
        let median = cosines.get(cosines.len() / 2);
        let differ = median.is_some_and(|&median| median < DIFFERENT);
        let is_alike = |i: usize, j: usize| differ && i != j && self.cosine(i, j) > ALIKE;
        let of = |&i: &usize| {
            members
                .iter()
                .copied()
                .filter(|&j| is_alike(i, j))
                .collect()
        };
        members.iter().map(of).collect()
    }
}

/// Shares and scales of all members. `shares` are what the members' parts give them and sum to one, in the order of `gram`,
/// which callers make that of the institutions.
///
/// Members whose updates are [alike](Gram::alike) share one vote: up to f + 1 of them, f = (n - 1) / 4, as many as liars and the one
/// whose text they have. More than that may be an honest majority.
///
/// Where fewer members are left than a defence was made for, it tolerates fewer liars: multi-Krum and the trimmed mean lower
/// f, and below three members nothing is changed. A member that was left out before counts as one of the f.
#[must_use]
pub fn defend(defence: Defence, rule: MergeRule, gram: &Gram, shares: &[f64]) -> Votes {
    let mut state = State::new(gram, shares);
    if defence == Defence::None {
        return state.finish(0);
    }
    for (i, suspect) in gram.suspects().into_iter().enumerate() {
        state.votes[i].excluded = suspect;
    }
    state.share_out();
    let left = state.left().count();
    if left < 3 {
        return state.finish(0);
    }
    let gone = gram.members() - left;
    let faulty = |byzantine: u32| (byzantine as usize).saturating_sub(gone);
    let mut trimmed = 0;
    match defence {
        Defence::None => {}
        Defence::Standard => {
            state.clip();
            let f = ((gram.members() - 1) / 4)
                .saturating_sub(gone)
                .min((left - 1) / 4);
            if f > 0 && rule == MergeRule::Product {
                trimmed = f;
            } else {
                state.geometric_median(STEPS);
            }
        }
        Defence::ClipNorm => state.clip(),
        Defence::CentredClipping {
            radius_permille,
            iterations,
        } => state.centred_clipping(f64::from(radius_permille) / 1000.0, iterations),
        Defence::GeometricMedian { iterations } => state.geometric_median(iterations),
        Defence::MultiKrum { byzantine, keep } => {
            state.multi_krum(faulty(byzantine), keep as usize);
        }
        Defence::TrimmedMean { byzantine } => {
            state.clip();
            trimmed = faulty(byzantine).min((left - 1) / 4);
        }
    }
    state.finish(trimmed)
}

struct State<'a> {
    gram: &'a Gram,
    /// What the members' parts give them.
    parts: &'a [f64],
    votes: Vec<Vote>,
}

impl<'a> State<'a> {
    fn new(gram: &'a Gram, parts: &'a [f64]) -> Self {
        let vote = |&share: &f64| Vote {
            share,
            scale: 1.0,
            excluded: None,
        };
        Self {
            gram,
            parts,
            votes: parts.iter().map(vote).collect(),
        }
    }

    /// Members that count.
    fn left(&self) -> impl Iterator<Item = usize> + use<'_> {
        let votes = self.votes.iter().enumerate();
        votes.filter_map(|(i, vote)| vote.excluded.is_none().then_some(i))
    }

    /// Gives those that count their parts' shares of one, equal ones where these are zero. Those that are alike share.
    fn share_out(&mut self) {
        let left: Vec<usize> = self.left().collect();
        let most = (self.gram.members().saturating_sub(1)) / 4 + 1;
        let is_empty = left.iter().all(|&i| self.parts[i] <= 0.0);
        let parts: Vec<f64> = left
            .iter()
            .zip(self.gram.alike(&left))
            .map(|(&i, alike)| {
                let part = if is_empty { 1.0 } else { self.parts[i] };
                let sharers = alike.len() + 1;
                if sharers <= most {
                    part / sharers as f64
                } else {
                    part
                }
            })
            .collect();
        let total: f64 = parts.iter().sum();
        for vote in &mut self.votes {
            vote.share = 0.0;
        }
        for (&i, part) in left.iter().zip(parts) {
            self.votes[i].share = part / total;
        }
    }

    fn median_norm(&self) -> f64 {
        self.gram.median_norm(self.left())
    }

    fn clip(&mut self) {
        let most = self.median_norm();
        for (i, vote) in self.votes.iter_mut().enumerate() {
            let norm = self.gram.norm(i);
            if norm > most {
                vote.scale = most / norm;
            }
        }
    }

    /// Inner products of the updates as they are scaled now.
    fn scaled(&self) -> Gram {
        let n = self.gram.members();
        let scaled = |i: usize| self.votes[i / n].scale * self.votes[i % n].scale;
        let values = self.gram.values.iter().enumerate();
        Gram {
            members: n,
            values: values.map(|(i, value)| scaled(i) * value).collect(),
        }
    }

    /// `z = sum w_m tau_m`, w_m proportional to p_m / |tau_m - z|, from the weighted mean.
    fn geometric_median(&mut self, steps: u32) {
        let gram = self.scaled();
        let least = SMOOTHING * self.median_norm();
        if least <= 0.0 {
            return;
        }
        let parts: Vec<f64> = self.votes.iter().map(|vote| vote.share).collect();
        let mut weights = parts.clone();
        for _ in 0..steps {
            let distances = gram.distances(&weights).into_iter();
            let pulls = distances
                .zip(&parts)
                .map(|(distance, part)| part / distance.max(least));
            let next: Vec<f64> = pulls.collect();
            let total: f64 = next.iter().sum();
            weights = next.iter().map(|weight| weight / total).collect();
        }
        for (vote, weight) in self.votes.iter_mut().zip(weights) {
            vote.share = weight;
        }
    }

    /// The centre is `sum c_m tau_m`; c_m is kept as share times scale.
    fn centred_clipping(&mut self, radius: f64, iterations: u32) {
        let radius = radius * self.median_norm();
        let mut centre = vec![0.0; self.votes.len()];
        for _ in 0..iterations {
            let mut next = centre.clone();
            let distances = self.gram.distances(&centre);
            for (i, (vote, distance)) in self.votes.iter().zip(distances).enumerate() {
                let pull = if distance > radius {
                    radius / distance
                } else {
                    1.0
                };
                next[i] += vote.share * pull;
                for (value, before) in next.iter_mut().zip(&centre) {
                    *value -= vote.share * pull * before;
                }
            }
            centre = next;
        }
        for (vote, c) in self.votes.iter_mut().zip(centre) {
            if vote.share > 0.0 {
                vote.scale = c / vote.share;
            }
        }
    }

    /// The sum of squared distances to the n - f - 2 nearest decides; ties go to the earlier member.
    fn multi_krum(&mut self, byzantine: usize, keep: usize) {
        let left: Vec<usize> = self.left().collect();
        let byzantine = byzantine.min((left.len() - 3) / 2);
        let nearest = left.len() - byzantine - 2;
        let squared = |i: usize, j: usize| {
            let gram = self.gram;
            (gram.inner(i, i) - 2.0 * gram.inner(i, j) + gram.inner(j, j)).max(0.0)
        };
        let mut scores: Vec<(f64, usize)> = left
            .iter()
            .map(|&i| {
                let others = left.iter().filter(|&&j| j != i);
                let mut distances: Vec<f64> = others.map(|&j| squared(i, j)).collect();
                distances.sort_by(f64::total_cmp);
                (distances.iter().take(nearest).sum(), i)
            })
            .collect();
        scores.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        for &(_, i) in scores.iter().skip(keep.min(nearest)) {
            self.votes[i].excluded = Some(Exclusion::FarFromOthers);
        }
        self.share_out();
    }

    fn finish(self, trimmed: usize) -> Votes {
        Votes {
            votes: self.votes,
            trimmed,
        }
    }
}
