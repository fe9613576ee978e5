//! A node's blocks, whoever gives them: what is its own, how far it is with each, and that it wants more. One interface, two
//! implementations: a list in manifests, and IPAMBlock objects of the API server, where every word is a compare-and-swap.
//!
//! Decides nothing: what to say when is the caller's (`kun_cni_core::claims`). Refuses to say anything about a block that has changed
//! since it was read. Governing: the header of the IPAMBlock kind.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kun_config::types::{BlockId, SlotClass};
use serde_json::json;

use crate::api::write::{WriteError, Writer};
use crate::crd::Phase;
use crate::{Interner, IpamBlock, Kind, Object, ObjectName, Origin, Resource, Store};

/// A block that is this node's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The block.
    pub block: BlockId,
    /// The number of owners so far, this one included.
    pub epoch: i64,
    /// The owner is to return it.
    pub draining: bool,
    /// How far the owner is, as it said itself.
    pub phase: Phase,
    /// Changes of what is asked for so far; of a list there is no number.
    pub generation: Option<i64>,
    /// The one that the owner's status is about.
    pub observed: Option<i64>,
    /// What the owner said last; all zero before.
    pub word: Word,
    name: ObjectName,
    /// metadata.resourceVersion; of a list there is none.
    version: Option<Arc<str>>,
}

impl Held {
    /// Whether owners are counted and each is waited for: on an API server, where a block that was returned comes back under a higher
    /// epoch or not at all.
    pub fn is_counted(&self) -> bool {
        self.version.is_some()
    }
}

/// What an owner says of a block besides its phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Word {
    /// Slots that pods have.
    pub allocated: u32,
    /// Slots that wait until the network has forgotten them.
    pub cooling: u32,
    /// Blocks of this class that the owner wants to have in all. Said on one of its blocks.
    pub wanted: Option<u32>,
}

/// Why nothing was said.
#[derive(Debug, thiserror::Error)]
pub enum BlocksError {
    /// Somebody wrote to it since it was read. The next view tells what.
    #[error("block {block}: {source}")]
    Overtaken {
        /// The block.
        block: BlockId,
        /// The server's word.
        source: WriteError,
    },
    /// The server does not take it: a right that is missing, an object that breaks a rule.
    #[error("block {block}: {source}")]
    Refused {
        /// The block.
        block: BlockId,
        /// The server's word.
        source: WriteError,
    },
    /// The server is not to be had. What was said may have been heard.
    #[error("block {block}: {source}")]
    Away {
        /// The block.
        block: BlockId,
        /// What happened.
        source: WriteError,
    },
    /// A list has what it has.
    #[error("manifests list this node's blocks: add an IPAMBlock with spec.node {node}")]
    Listed {
        /// This node.
        node: Arc<str>,
    },
    /// The wish for another is said on a block that one has.
    #[error(
        "no confirmed {class:?} block to ask on; the first one is given without being asked for"
    )]
    NoVoice {
        /// Of which class.
        class: SlotClass,
    },
}

impl BlocksError {
    /// How long the server asks to be left alone.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Away {
                source: WriteError::Busy { retry_after, .. },
                ..
            } => *retry_after,
            _ => None,
        }
    }
}

/// Where a node's blocks come from and go to.
pub trait Blocks: Debug + Send + Sync {
    /// What is this node's, as the cluster was read last and as this node has changed it since.
    fn owned(&self, store: &Store) -> Vec<Held>;

    /// Says how far the node is: `Confirmed` takes the block for good, `Drained` gives it back. [`BlocksError::Overtaken`] if it is
    /// not any more as it was read.
    fn tell(&self, held: &Held, phase: Phase, word: Word) -> Result<(), BlocksError>;

    /// Wants to have so many blocks of the class in all: one more than there are claims one more. That they come is seen in
    /// [`Blocks::owned`]. Says nothing that was said already.
    fn want(&self, owned: &[Held], class: SlotClass, wanted: u32) -> Result<(), BlocksError>;
}

/// The block on which a node says how many it wants: its lowest confirmed one of the class.
pub fn voice(owned: &[Held], class: SlotClass) -> Option<&Held> {
    let of_class = owned.iter().filter(|held| held.block.class() == class);
    of_class
        .filter(|held| held.phase == Phase::Confirmed && !held.draining)
        .min_by_key(|held| held.block)
}

/// Whose name and uid it has. In a folder a name is all there is.
fn is_ours(block: &IpamBlock, uid: Option<&Arc<str>>) -> bool {
    let owner = block.spec.node_uid.as_ref();
    owner.is_none_or(|owner| uid.is_some_and(|uid| uid == owner.shared()))
}

/// IPAMBlock manifests. Nobody waits to hear of them, so that a word is taken at once and goes nowhere.
#[derive(Debug)]
pub struct ListedBlocks {
    node: Arc<str>,
}

impl ListedBlocks {
    /// Of this node.
    pub fn new(node: &str) -> Self {
        Self { node: node.into() }
    }
}

impl Blocks for ListedBlocks {
    fn owned(&self, store: &Store) -> Vec<Held> {
        let uid = store.node(&self.node).map(|node| &node.meta.uid);
        let ours = store.blocks_of(&self.node).filter(|b| is_ours(b, uid));
        ours.map(|block| Held {
            block: block.block(),
            epoch: block.spec.epoch,
            draining: block.spec.draining,
            phase: Phase::Confirmed,
            generation: None,
            observed: None,
            word: Word::default(),
            name: block.meta.name.clone(),
            version: None,
        })
        .collect()
    }

    fn tell(&self, _: &Held, _: Phase, _: Word) -> Result<(), BlocksError> {
        Ok(())
    }

    fn want(&self, owned: &[Held], class: SlotClass, wanted: u32) -> Result<(), BlocksError> {
        let has = owned.iter().filter(|held| held.block.class() == class);
        match usize::try_from(wanted).is_ok_and(|wanted| wanted <= has.count()) {
            true => Ok(()),
            false => Err(BlocksError::Listed {
                node: Arc::clone(&self.node),
            }),
        }
    }
}

/// IPAMBlock objects. A node writes their status and nothing else; whose a block is, is the operator's to write.
#[derive(Debug)]
pub struct ApiBlocks {
    node: Arc<str>,
    writer: Writer,
    answers: Mutex<Answers>,
}

/// What the server answered to our words, until the watch has told it too.
#[derive(Debug, Default)]
struct Answers {
    /// By name; at most the blocks of this node.
    blocks: BTreeMap<ObjectName, Arc<IpamBlock>>,
    names: Interner,
}

impl ApiBlocks {
    /// Of this node. Calls of `tell` and `want` block.
    pub fn new(node: &str, writer: Writer) -> Self {
        Self {
            node: node.into(),
            writer,
            answers: Mutex::default(),
        }
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        // An answer is put in whole or not at all.
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Blocks for ApiBlocks {
    fn owned(&self, store: &Store) -> Vec<Held> {
        let uid = store.node(&self.node).map(|node| &node.meta.uid);
        let answers = &mut self.answers().blocks;
        // What the watch does not name any more is not ours, whatever was answered before.
        answers.retain(|name, answer| store.block(name).is_some_and(|b| is_later(answer, b)));
        let told = store.blocks_of(&self.node);
        let latest = told.map(|block| answers.get(&block.meta.name).unwrap_or(block));
        latest
            .filter(|block| *block.node() == self.node && is_ours(block, uid))
            .filter_map(|block| held(block))
            .collect()
    }

    fn tell(&self, held: &Held, phase: Phase, word: Word) -> Result<(), BlocksError> {
        let block = held.block;
        // A merge patch: `null` removes what an owner before wanted.
        let patch = json!({
            "metadata": {"resourceVersion": held.version.as_deref()},
            "status": {
                "observedGeneration": held.generation,
                "epoch": held.epoch,
                "phase": phase,
                "allocated": word.allocated,
                "cooling": word.cooling,
                "wanted": word.wanted,
            },
        });
        let resource = Resource::of(Kind::IpamBlock);
        let answer = self
            .writer
            .patch_status(resource, &held.name, &patch)
            .map_err(|source| match source {
                WriteError::Conflict { .. }
                | WriteError::NotFound { .. }
                | WriteError::Gone { .. } => BlocksError::Overtaken { block, source },
                WriteError::Forbidden { .. }
                | WriteError::Invalid { .. }
                | WriteError::Unauthorized { .. } => BlocksError::Refused { block, source },
                source => BlocksError::Away { block, source },
            })?;
        let mut answers = self.answers();
        let read = crate::api::read_answer(&mut answers.names, Kind::IpamBlock, &answer);
        if let Some(Object::IpamBlock(object)) = read {
            answers.blocks.insert(held.name.clone(), object);
        }
        Ok(())
    }

    fn want(&self, owned: &[Held], class: SlotClass, wanted: u32) -> Result<(), BlocksError> {
        let voice = voice(owned, class).ok_or(BlocksError::NoVoice { class })?;
        let say = |held: &Held, wanted| match held.word.wanted == wanted {
            true => Ok(()),
            false => self.tell(
                held,
                held.phase,
                Word {
                    wanted,
                    ..held.word
                },
            ),
        };
        say(voice, Some(wanted))?;
        // The highest wish counts: what was said on another block is taken back.
        let of_class = owned.iter().filter(|held| held.block.class() == class);
        let mut others = of_class.filter(|held| held.block != voice.block);
        others.try_for_each(|held| say(held, None))
    }
}

fn held(block: &IpamBlock) -> Option<Held> {
    let Origin::Api { resource_version } = &block.meta.origin else {
        return None;
    };
    let status = block.status.as_ref();
    let own = status.filter(|status| status.epoch == Some(block.spec.epoch));
    let word = own.map_or_else(Word::default, |status| Word {
        allocated: status.allocated.unwrap_or(0),
        cooling: status.cooling.unwrap_or(0),
        wanted: status.wanted,
    });
    Some(Held {
        block: block.block(),
        epoch: block.spec.epoch,
        draining: block.spec.draining,
        phase: block.phase(),
        generation: block.generation,
        observed: own.and_then(|status| status.observed_generation),
        word,
        name: block.meta.name.clone(),
        version: Some(Arc::clone(resource_version)),
    })
}

/// Whether the answer is of a later version of the same object than what was told. resourceVersions are numbers that grow (KEP-5504).
fn is_later(answer: &IpamBlock, told: &IpamBlock) -> bool {
    let number = |block: &IpamBlock| match &block.meta.origin {
        Origin::Api { resource_version } => resource_version.parse::<u64>().ok(),
        Origin::File { .. } => None,
    };
    answer.meta.uid == told.meta.uid && number(answer) > number(told)
}
