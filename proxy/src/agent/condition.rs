//! The condition of this Node that says whether interfaces of pods that are gone could not be taken away: `kun_cluster::NICS_LEFT`.
//!
//! True names the interfaces. It is written when it changes, and once where a Node has none; other conditions are others', and a
//! strategic merge patch leaves them alone. Governing: core/v1 NodeCondition.

use std::sync::{Arc, Mutex, PoisonError};

use kun_cluster::api::write::{WriteError, Writer, time};
use kun_cluster::{Kind, NICS_LEFT, ObjectName, Resource};
use kun_cni::ipam::BootTime;
use serde_json::{Value, json};

use super::api_writes::Teller;
use super::cluster::View;

/// Interfaces that the message names.
const MAX_NAMED: usize = 5;

/// What stays: name and why, as the last round found it; `None`: no round yet.
#[derive(Debug, Clone, Default)]
pub(crate) struct Left(Arc<Mutex<Option<Vec<String>>>>);

impl Left {
    /// The last round's.
    pub(crate) fn set(&self, left: Vec<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(left);
    }

    fn get(&self) -> Option<Vec<String>> {
        let left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        left.clone()
    }
}

/// Keeps the condition.
#[derive(Debug)]
pub(crate) struct Tell {
    node: String,
    view: Arc<View>,
    left: Left,
    /// What this process has written, and of which Node.
    written: Option<(Arc<str>, Vec<String>)>,
}

impl Tell {
    pub(crate) fn new(node: &str, view: Arc<View>, left: Left) -> Self {
        Self {
            node: node.to_owned(),
            view,
            left,
            written: None,
        }
    }
}

impl Teller for Tell {
    fn what(&self) -> &'static str {
        "Node condition"
    }

    fn turn(&mut self, writer: &Writer, _now: BootTime) -> Result<(), WriteError> {
        let (Some(left), Some((uid, stands))) = (self.left.get(), self.view.nics_left(&self.node))
        else {
            return Ok(());
        };
        let written = self.written.as_ref().filter(|(of, _)| *of == uid);
        // What this process wrote may not have come back to it yet. Before it wrote anything it knows only True or False.
        let (status, same) = match written {
            Some((_, names)) => (Some(!names.is_empty()), *names == left),
            None => (stands, stands == Some(false) && left.is_empty()),
        };
        if same {
            return Ok(());
        }
        let turns = status != Some(!left.is_empty());
        let condition = condition(&left, turns.then(time));
        let name = ObjectName::new("", &self.node);
        writer.patch_conditions(Resource::of(Kind::Node), &name, &[condition])?;
        self.written = Some((uid, left));
        Ok(())
    }
}

/// `turned`: when it is another status than before. What is left out stays what it was.
fn condition(left: &[String], turned: Option<String>) -> Value {
    let (status, reason, message) = match left {
        [] => (
            "False",
            "AllReclaimed",
            "no interface of a pod that is gone is left".to_owned(),
        ),
        left => {
            let named: Vec<&str> = left.iter().take(MAX_NAMED).map(String::as_str).collect();
            let more = left.len() - named.len();
            let more = if more > 0 {
                format!("; {more} more")
            } else {
                String::new()
            };
            let message = format!(
                "interfaces of pods that are gone cannot be removed: {}{more}",
                named.join("; ")
            );
            ("True", "InterfacesStay", message)
        }
    };
    let mut condition =
        json!({"type": NICS_LEFT, "status": status, "reason": reason, "message": message});
    if let Some(at) = turned {
        condition["lastHeartbeatTime"] = json!(at);
        condition["lastTransitionTime"] = json!(at);
    }
    condition
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_says_what_stays_and_turns_only_with_its_status() {
        let none = condition(&[], Some("t".to_owned()));
        assert_eq!(none["status"], "False");
        assert_eq!(none["lastTransitionTime"], "t");
        let left: Vec<String> = (0..7).map(|i| format!("kun{i}: busy")).collect();
        let some = condition(&left, None);
        assert_eq!(some["status"], "True");
        assert!(some.get("lastTransitionTime").is_none());
        let message = some["message"].as_str().unwrap();
        assert!(message.contains("kun4: busy; 2 more") && !message.contains("kun5"));
    }
}
