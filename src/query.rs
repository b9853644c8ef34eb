//! One step's question to a shard, shared by every stage.

use floe_cuda::{Attend, AttendParams, Isa};

/// The query heads that share one kv head, at one position.
#[derive(Clone, Copy, Debug)]
pub struct GroupQuery<'a> {
    /// Post-RoPE queries, `[group, head_dim]` f32, host memory.
    pub q: &'a [f32],
    /// Query heads of the group.
    pub group: usize,
    /// Softmax scale, applied to `q.k`; usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

impl<'a> GroupQuery<'a> {
    /// Attention mass of a token with this key `[head_dim]`, mean over the heads, among tokens whose lse is `lse` `[group]`.
    pub(crate) fn mass(&self, key: &[f32], lse: &[f32]) -> f32 {
        let share = |(q, lse): (&[f32], &f32)| {
            let logit = q.iter().zip(key).map(|(q, k)| q * k).sum::<f32>() * self.scale;
            (logit - lse).exp()
        };
        self.q.chunks_exact(key.len()).zip(lse).map(share).sum::<f32>() / self.group as f32
    }

    /// The kernels' form of this query over typed rows of its shard.
    pub(crate) fn over<R>(&self, isa: Isa, rows: &'a R) -> Attend<'a, R> {
        Attend { isa, q: self.q, rows, params: AttendParams { scale: self.scale, softcap: None } }
    }
}
