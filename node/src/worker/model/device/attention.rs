//! Causal attention of grouped queries over packed items.
//!
//! Items of about the same length are filled up to one and computed together, so that nothing of the size of the whole
//! batch squared exists. What fills an item up comes after all of its own positions, which therefore do not see it, and has
//! no gradient because its output has none. Probabilities are kept for the backward pass.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::ops::softmax_last_dim;
use consilium_kernels::layers::{Heads, Segment};

/// Scores that one group may have at a time, unless a single item has more.
const SCORES: usize = 1 << 28;

/// Groups of items, and which layers see how much of them.
#[derive(Debug)]
pub(super) struct Packing {
    groups: Vec<Group>,
    /// Where each row of the batch is among the rows of all groups; none where they are the same.
    back: Option<Tensor>,
}

/// Items of about one length.
#[derive(Debug)]
struct Group {
    items: usize,
    len: usize,
    rows: Rows,
    /// By window: 0 where a position sees itself or a later one may not, minus infinity elsewhere, `[len, len]`.
    masks: Vec<(usize, Tensor)>,
}

/// Rows of a batch that a group has.
#[derive(Debug)]
enum Rows {
    /// Neighbours, from this one on.
    Whole(usize),
    /// By index, those that only fill up included, and 1 for each that does not.
    Chosen { index: Tensor, real: Tensor },
}

/// What the backward pass needs of one group: queries, keys and values by head, probabilities and outputs.
pub(super) struct Kept {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    out: Tensor,
}

impl Packing {
    /// Groups the items of a batch for layers of these windows.
    pub(super) fn new(
        segments: &[Segment],
        heads: usize,
        windows: &[usize],
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let mut order: Vec<&Segment> = segments.iter().collect();
        order.sort_by_key(|segment| std::cmp::Reverse(segment.len));
        let total: usize = segments.iter().map(|segment| segment.len).sum();
        let mut back = vec![0u32; total];
        let (mut groups, mut first) = (Vec::new(), 0u32);
        let mut rest = order.as_slice();
        while let Some(longest) = rest.first() {
            let most = (SCORES / (heads * longest.len * longest.len)).max(1);
            let close = |segment: &&&Segment| segment.len * 5 >= longest.len * 4;
            let count = rest.iter().take(most).take_while(close).count();
            let (members, others) = rest.split_at(count);
            rest = others;
            groups.push(Group::new(
                members, &mut back, &mut first, windows, device, dtype,
            )?);
        }
        let is_same = (0u32..).zip(&back).all(|(row, place)| row == *place);
        let back = (!is_same)
            .then(|| Tensor::from_vec(back, total, device))
            .transpose()?;
        Ok(Self { groups, back })
    }

    /// Outputs of all rows `[rows, queries * dim]`; `q` is `[rows, queries, dim]`, the others `[rows, keys, dim]`.
    pub(super) fn forward(
        &self,
        heads: Heads,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<(Tensor, Vec<Kept>)> {
        let mut kept = Vec::with_capacity(self.groups.len());
        let mut outputs = Vec::with_capacity(self.groups.len());
        for group in &self.groups {
            let (q, k, v) = (
                group.by_head(q, heads.keys)?,
                group.by_head(k, heads.keys)?,
                group.by_head(v, heads.keys)?,
            );
            let scores = q.matmul(&k.t()?)?;
            let p = group.softmax(heads, &scores)?;
            let out = p.matmul(&v)?;
            outputs.push(group.by_row(&out, heads.keys, heads.queries)?);
            kept.push(Kept { q, k, v, p, out });
        }
        let mixed = self.in_order(outputs)?;
        let rows = mixed.dim(0)?;
        Ok((mixed.reshape((rows, heads.out()))?, kept))
    }

    /// Gradients of queries, keys and values, as they were given. `dS = P (dP - sum(dO O))`.
    pub(super) fn backward(
        &self,
        heads: Heads,
        kept: &[Kept],
        dmixed: &Tensor,
    ) -> Result<[Tensor; 3]> {
        let rows = dmixed.dim(0)?;
        let dmixed = dmixed.reshape((rows, heads.queries, heads.dim))?;
        let mut parts = [Vec::new(), Vec::new(), Vec::new()];
        for (group, kept) in self.groups.iter().zip(kept) {
            let dout = group.gradient_by_head(&dmixed, heads.keys)?;
            let dv = kept.p.t()?.matmul(&dout)?;
            let dp = dout.matmul(&kept.v.t()?)?;
            let dot = (&dout * &kept.out)?.to_dtype(DType::F32)?;
            let dot = dot.sum_keepdim(D::Minus1)?.to_dtype(dp.dtype())?;
            let ds = (&kept.p * dp.broadcast_sub(&dot)?)?;
            let dq = ds.matmul(&kept.k)?;
            let dk = ds.t()?.matmul(&kept.q)?;
            for (part, (gradient, count)) in
                parts
                    .iter_mut()
                    .zip([(dq, heads.queries), (dk, heads.keys), (dv, heads.keys)])
            {
                part.push(group.by_row(&gradient, heads.keys, count)?);
            }
        }
        let [q, k, v] = parts;
        Ok([self.in_order(q)?, self.in_order(k)?, self.in_order(v)?])
    }

    /// Rows of all groups in the order of the batch.
    fn in_order(&self, parts: Vec<Tensor>) -> Result<Tensor> {
        let all = match <[Tensor; 1]>::try_from(parts) {
            Ok([only]) => only,
            Err(parts) => Tensor::cat(&parts, 0)?,
        };
        match &self.back {
            Some(back) => all.index_select(back, 0),
            None => Ok(all),
        }
    }
}

impl Group {
    fn new(
        members: &[&Segment],
        back: &mut [u32],
        first: &mut u32,
        windows: &[usize],
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let items = members.len();
        let len = members.first().map_or(0, |segment| segment.len);
        let mut index = Vec::with_capacity(items * len);
        let mut real = Vec::with_capacity(items * len);
        for segment in members {
            for position in 0..len {
                let is_real = position < segment.len;
                let row = segment.start + if is_real { position } else { 0 };
                if is_real {
                    back[row] = *first;
                }
                // A batch has fewer rows than u32 has values: its tokens are u32 in memory.
                index.push(u32::try_from(row).unwrap_or(u32::MAX));
                real.push(f32::from(u8::from(is_real)));
                *first += 1;
            }
        }
        let start = members.first().map_or(0, |segment| segment.start);
        let is_whole = (start..)
            .zip(&index)
            .all(|(row, index)| row == *index as usize);
        let count = index.len();
        let rows = if is_whole {
            Rows::Whole(start)
        } else {
            let real = Tensor::from_vec(real, (count, 1, 1), &Device::Cpu)?;
            Rows::Chosen {
                index: Tensor::from_vec(index, count, device)?,
                real: real.to_dtype(dtype)?.to_device(device)?,
            }
        };
        let masks = windows
            .iter()
            .map(|&window| Ok((window, mask(len, window, device, dtype)?)))
            .collect::<Result<_>>()?;
        Ok(Self {
            items,
            len,
            rows,
            masks,
        })
    }

    /// Rows `[rows, heads, dim]` of the group's items, as `[items * keys, heads / keys * len, dim]`.
    fn by_head(&self, x: &Tensor, keys: usize) -> Result<Tensor> {
        self.heads_first(&self.chosen(x)?, keys)
    }

    /// As [`by_head`](Self::by_head), zero where a row only fills up.
    fn gradient_by_head(&self, x: &Tensor, keys: usize) -> Result<Tensor> {
        let rows = self.chosen(x)?;
        match &self.rows {
            Rows::Whole(_) => self.heads_first(&rows, keys),
            Rows::Chosen { real, .. } => self.heads_first(&rows.broadcast_mul(real)?, keys),
        }
    }

    fn chosen(&self, x: &Tensor) -> Result<Tensor> {
        match &self.rows {
            Rows::Whole(first) => x.narrow(0, *first, self.items * self.len),
            Rows::Chosen { index, .. } => x.contiguous()?.index_select(index, 0),
        }
    }

    fn heads_first(&self, rows: &Tensor, keys: usize) -> Result<Tensor> {
        let (_, heads, dim) = rows.dims3()?;
        let group = heads / keys;
        rows.contiguous()?
            .reshape((self.items, self.len, keys, group, dim))?
            .permute((0, 2, 3, 1, 4))?
            .contiguous()?
            .reshape((self.items * keys, group * self.len, dim))
    }

    /// The inverse of [`by_head`](Self::by_head), rows that fill up included.
    fn by_row(&self, x: &Tensor, keys: usize, heads: usize) -> Result<Tensor> {
        let dim = x.dim(D::Minus1)?;
        x.reshape((self.items, keys, heads / keys, self.len, dim))?
            .permute((0, 3, 1, 2, 4))?
            .contiguous()?
            .reshape((self.items * self.len, heads, dim))
    }

    /// Probabilities of the scores `[items * keys, group * len, len]`.
    fn softmax(&self, heads: Heads, scores: &Tensor) -> Result<Tensor> {
        let (batch, rows, len) = scores.dims3()?;
        let mask = self
            .masks
            .iter()
            .find(|(window, _)| *window == heads.window);
        let Some((_, mask)) = mask else {
            candle_core::bail!("no mask for a window of {} positions", heads.window)
        };
        let scores = scores.reshape((batch, rows / len, len, len))?;
        softmax_last_dim(&scores.broadcast_add(mask)?)?.reshape((batch, rows, len))
    }
}

/// What is added to scores: nothing where a position sees another, else minus infinity.
fn mask(len: usize, window: usize, device: &Device, dtype: DType) -> Result<Tensor> {
    let positions = Tensor::arange(0f32, len as f32, device)?;
    let back = positions
        .reshape((len, 1))?
        .broadcast_sub(&positions.reshape((1, len))?)?;
    let seen = back.ge(0f32)?;
    let seen = if window < len {
        (seen * back.lt(window as f32)?)?
    } else {
        seen
    };
    let zero = Tensor::zeros((len, len), dtype, device)?;
    let hidden = (Tensor::ones((len, len), dtype, device)? * f64::NEG_INFINITY)?;
    seen.where_cond(&zero, &hidden)
}
