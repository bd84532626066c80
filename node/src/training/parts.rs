//! An estimate of memory as `plan` answers it: the peak and its parts, of the host and of a device.

use serde::Serialize;
use serde_json::Value;

use crate::reply::Reply;
use crate::worker::plan::Estimate;

/// Adds every number.
pub(super) fn with_estimate(reply: Reply, estimate: &Estimate) -> Reply {
    match estimate {
        Estimate::Host(memory) => with(reply, "", memory.total(), memory),
        Estimate::Device(device, host) => {
            let reply = with(reply, "device_", device.total(), device);
            with(reply, "", host.total(), host)
        }
    }
}

/// The total, and every field of the parts by its name.
fn with(reply: Reply, place: &str, total: usize, parts: &impl Serialize) -> Reply {
    let reply = reply.with(&format!("{place}memory_bytes"), total);
    let Ok(Value::Object(parts)) = serde_json::to_value(parts) else {
        return reply;
    };
    parts.into_iter().fold(reply, |reply, (name, bytes)| {
        reply.with(&format!("{place}{name}_bytes"), bytes)
    })
}
