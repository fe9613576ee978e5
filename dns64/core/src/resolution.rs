//! One question on its way upstream, without I/O: what to ask, and what the replies make together.
//!
//! DNS64 asks for AAAA and A at once (RFC 6147 §5.1.8): the A reply is there when it turns out to be needed.

use std::sync::Arc;
use std::time::Duration;

use crate::answer::{Answer, Key, Profile};
use crate::cache::Found;
use crate::chain::{Chain, Job, Source, Walk};
use crate::dns64::{self, Native};
use crate::message::{Message, Record};
use crate::query::{Query, Transport};
use crate::wire::{UDP_PAYLOAD, flag, rcode, rtype};
use crate::world::World;

/// Aliases that are followed here: ExternalName to ExternalName, and no circle.
const MAX_ALIASES: usize = 8;

/// A question to an upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// Which `forward`: index into [`World::forwards`].
    pub forward: usize,
    /// Name, wire form.
    pub name: Vec<u8>,
    /// Type.
    pub qtype: u16,
    /// DO.
    pub dnssec_ok: bool,
    /// CD.
    pub checking_disabled: bool,
}

impl Ask {
    /// The message, with this id.
    pub fn encode(&self, id: u16) -> Vec<u8> {
        let mut out = Vec::with_capacity(28 + self.name.len());
        out.extend_from_slice(&id.to_be_bytes());
        let flags = flag::RD | if self.checking_disabled { flag::CD } else { 0 };
        out.extend_from_slice(&flags.to_be_bytes());
        out.extend_from_slice(&[0, 1, 0, 0, 0, 0, 0, 1]);
        out.extend_from_slice(&self.name);
        out.extend_from_slice(&self.qtype.to_be_bytes());
        out.extend_from_slice(&[0, 1, 0, 0, rtype::OPT as u8]);
        out.extend_from_slice(&UDP_PAYLOAD.to_be_bytes());
        out.extend_from_slice(&[0, 0, if self.dnssec_ok { 0x80 } else { 0 }, 0, 0, 0]);
        out
    }

    /// Whether `m` answers this question: letter case may differ (RFC 5452 §9.1).
    pub fn is_answered_by(&self, m: &Message) -> bool {
        m.qtype == self.qtype && m.name.eq_ignore_ascii_case(&self.name)
    }
}

/// What a resolution came to.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The answer; SERVFAIL when nothing better was found.
    pub answer: Arc<Answer>,
    /// What went wrong, for `errors`.
    pub error: Option<String>,
}

#[derive(Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "one for each query in flight, and mostly the large one"
)]
enum Stage {
    Plain,
    Synthesis {
        chain: Arc<Chain>,
        aaaa: Option<Result<Message, String>>,
        a: Option<Result<Message, String>>,
    },
    Done,
}

/// A question on its way.
#[derive(Debug)]
pub struct Resolution {
    name: Vec<u8>,
    qtype: u16,
    /// Aliases in front of what is found.
    aliases: Vec<Record>,
    /// The name that is asked for upstream.
    target: Vec<u8>,
    asks: Vec<Ask>,
    stage: Stage,
    outcome: Option<Outcome>,
}

impl Resolution {
    /// Begins: either asks come out, or the outcome is there at once.
    pub fn start(job: &Job, world: &World, now: Duration) -> Self {
        let mut r = Self {
            name: job.name.clone(),
            qtype: job.qtype,
            aliases: Vec::new(),
            target: job.name.clone(),
            asks: Vec::new(),
            stage: Stage::Plain,
            outcome: None,
        };
        r.pursue(job, world, now);
        r
    }

    fn pursue(&mut self, job: &Job, world: &World, now: Duration) {
        let mut out = Vec::new();
        for _ in 0..=MAX_ALIASES {
            let Some(chain) = world.route(job.listen, &self.target, self.qtype) else {
                return self.deliver(
                    Message::empty(&self.target, self.qtype, rcode::NOERROR),
                    None,
                );
            };
            // A question of our own is large enough for every answer, and asks for no more than the client did.
            let wire = question(&self.target, self.qtype, job.profile);
            let Ok(query) = Query::parse(&wire, Transport::Tcp) else {
                return self.fail("a name that cannot be asked for".to_owned());
            };
            let profile = Profile {
                synthesise: job.profile.synthesise
                    || (self.qtype == rtype::AAAA && chain.dns64().is_some_and(|d| d.allow_ipv4)),
                ..job.profile
            };
            match chain.walk(&query, profile, &world.scene(None), &mut out) {
                Walk::Answered(Source::Nobody) | Walk::Nobody | Walk::Loop
                    if !self.aliases.is_empty() =>
                {
                    return self.deliver(
                        Message::empty(&self.target, self.qtype, rcode::NOERROR),
                        None,
                    );
                }
                Walk::Nobody | Walk::Loop => return self.fail("no plugin answers".to_owned()),
                Walk::Answered(_) => {
                    return match Message::parse(&out) {
                        Ok(m) => self.deliver(m, None),
                        Err(e) => self.fail(e.to_string()),
                    };
                }
                Walk::Alias(record, target) => {
                    self.aliases.push(record);
                    if self.qtype == rtype::CNAME {
                        return self
                            .deliver(Message::empty(&target, self.qtype, rcode::NOERROR), None);
                    }
                    self.target = target;
                }
                Walk::Forward(forward) => {
                    if !self.aliases.is_empty() {
                        let key = Key::new(&self.target, self.qtype, profile);
                        if let Found::Fresh { answer, ttl, .. } =
                            chain.cached(&self.target, &key, now)
                        {
                            chain.write(&query, &answer, ttl, 0, &mut out);
                            if let Ok(m) = Message::parse(&out) {
                                return self.deliver(m, None);
                            }
                        }
                    }
                    let ask = Ask {
                        forward,
                        name: self.target.clone(),
                        qtype: self.qtype,
                        dnssec_ok: profile.dnssec_ok,
                        checking_disabled: profile.checking_disabled,
                    };
                    if self.qtype == rtype::AAAA
                        && chain.dns64().is_some()
                        && dns64::may_synthesise(profile)
                    {
                        self.asks.push(Ask {
                            qtype: rtype::A,
                            ..ask.clone()
                        });
                        self.stage = Stage::Synthesis {
                            chain: chain.clone(),
                            aaaa: None,
                            a: None,
                        };
                    }
                    self.asks.insert(0, ask);
                    return;
                }
            }
        }
        self.fail(format!("more than {MAX_ALIASES} aliases"));
    }

    /// What is to be asked, all at once; empty when called again.
    pub fn take_asks(&mut self) -> Vec<Ask> {
        std::mem::take(&mut self.asks)
    }

    /// Takes the reply to the ask of this type, or why there is none.
    pub fn reply(&mut self, qtype: u16, reply: Result<Message, String>) {
        match &mut self.stage {
            Stage::Plain => match reply {
                Ok(m) => self.deliver(m, None),
                Err(e) => self.fail(e),
            },
            Stage::Synthesis { chain, aaaa, a } => {
                match qtype {
                    rtype::A => *a = Some(reply),
                    _ => *aaaa = Some(reply),
                }
                let spec = chain
                    .dns64()
                    .expect("synthesis begins only with one")
                    .clone();
                let bound = match aaaa {
                    None => return,
                    Some(native) => match dns64::judge(&spec, native.as_ref().ok().cloned()) {
                        Native::Use(m) => return self.deliver(*m, None),
                        Native::Synthesise { bound } => bound,
                    },
                };
                let Some(a) = a.take() else { return };
                let error = a.as_ref().err().cloned();
                let target = self.target.clone();
                let m = dns64::synthesise(&spec, a.ok(), &target, bound);
                self.deliver(m, error);
            }
            Stage::Done => {}
        }
    }

    fn fail(&mut self, error: String) {
        let m = Message::empty(&self.name, self.qtype, rcode::SERVFAIL);
        self.aliases.clear();
        self.deliver(m, Some(error));
    }

    fn deliver(&mut self, mut m: Message, error: Option<String>) {
        self.stage = Stage::Done;
        m.name.clone_from(&self.name);
        m.qtype = self.qtype;
        if !self.aliases.is_empty() {
            // The first record is ours: nobody validated it.
            m.flags &= !flag::AD;
            let mut answers = std::mem::take(&mut self.aliases);
            answers.append(&mut m.answers);
            m.answers = answers;
        }
        let (answer, error) = match Answer::from_message(&m) {
            Some(answer) => (answer, error),
            None => (
                Answer::bare(&self.name, self.qtype, rcode::SERVFAIL),
                Some("an answer beyond 65535 octets".to_owned()),
            ),
        };
        self.outcome = Some(Outcome {
            answer: Arc::new(answer),
            error,
        });
    }

    /// The outcome, once.
    pub fn take_outcome(&mut self) -> Option<Outcome> {
        self.outcome.take()
    }
}

fn question(name: &[u8], qtype: u16, profile: Profile) -> Vec<u8> {
    Ask {
        forward: 0,
        name: name.to_vec(),
        qtype,
        dnssec_ok: profile.dnssec_ok,
        checking_disabled: profile.checking_disabled,
    }
    .encode(0)
}
