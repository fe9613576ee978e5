//! What the dataplane says of itself, for `kunctl status`.

use kun_proxy_core::Problem;

use super::{Dataplane, PROBLEMS_NAMED, Report, Translator, fact};

impl Dataplane {
    pub(super) fn report(&mut self) -> Report {
        let totals = self.proxy.planner().totals();
        let limits = self.backend().limits();
        let state = match (&self.failing, self.synced_once) {
            (Some(failing), _) => fact("state", format!("failing: {}", failing.what), false),
            (None, false) => fact("state", "waiting for the cluster".into(), false),
            (None, true) => fact("state", "programmed".into(), true),
        };
        let part = |used: u32, of: u32| format!("{used} of {of}");
        let mut proxy = vec![
            state,
            fact("adopted", yes(self.adopted).into(), true),
            fact(
                "frontends",
                part(totals.frontends as u32, limits.services),
                true,
            ),
            fact("backends", part(totals.backends, limits.backends), true),
            fact("slots", part(totals.slots, limits.slots), true),
            fact("interfaces", format!("{} of pods", self.pods.len()), true),
            fact(
                "uplinks",
                if self.uplinks.is_empty() {
                    "none: no default route yet".into()
                } else {
                    self.uplinks.keys().cloned().collect::<Vec<_>>().join(", ")
                },
                !self.uplinks.is_empty(),
            ),
        ];
        proxy.extend(self.limiter.facts());
        if self.attachments.ports() > 0 {
            let count = self.attachments.ports().to_string();
            proxy.push(fact("host ports", count, true));
        }
        if self.proxy.planner().partial() {
            proxy.push(fact(
                "held",
                format!(
                    "{} frontends, {} backends in no readable manifest, until all can be read",
                    totals.held_frontends, totals.held_backends
                ),
                false,
            ));
        }
        if let Some(took) = self.last_batch {
            proxy.push(fact(
                "last sync",
                format!("{:.1} ms", took.as_secs_f64() * 1e3),
                true,
            ));
        }
        let problems: Vec<(String, Problem)> = self
            .proxy
            .planner()
            .problems()
            .take(PROBLEMS_NAMED)
            .map(|(name, problem)| (name.to_string(), problem.clone()))
            .collect();
        for (name, problem) in problems {
            proxy.push(fact(&format!("problem {name}"), problem.to_string(), false));
        }
        if let Ok(reasons) = self.backend().reasons() {
            for (reason, count) in reasons.into_iter().filter(|(_, n)| *n > 0) {
                proxy.push(fact(
                    &format!("drops {}", reason.label()),
                    count.to_string(),
                    true,
                ));
            }
        }
        let nat64 = self
            .translator
            .as_ref()
            .map_or_else(Vec::new, Translator::facts);
        Report { proxy, nat64 }
    }
}

fn yes(b: bool) -> &'static str {
    if b { "yes" } else { "no" }
}
