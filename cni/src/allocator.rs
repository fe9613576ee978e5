//! Whom the plugin asks for addresses: the agent where one answers, else the store itself.

use std::time::Duration;

use kun_cni_core::spec::{Code, Failure};
use kun_config::Config;
use kun_config::types::SlotClass;
use kun_control::{Client, ClientError, Request, Response, Unavailable};

use crate::alone;
use crate::clock::{self, ClockError};
use crate::ipam::{IpamError, IpamService};
use crate::spool::SpoolError;
use crate::store::StoreError;

/// How long a plugin alone waits for others that have the store: a hundred at once need a second or two, on a machine that does
/// much else many times that. Runtimes give up after minutes.
const STORE_WITHIN: Duration = Duration::from_secs(30);

/// What is done while an agent makes a slot durable: called once the class is known, and before if that has to be asked for.
pub(crate) type Meanwhile<'a> = &'a mut dyn FnMut(Option<SlotClass>);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AllocatorError {
    /// The agent.
    #[error(transparent)]
    Agent(#[from] ClientError),
    /// The store.
    #[error(transparent)]
    Ipam(#[from] IpamError),
    /// The clock.
    #[error(transparent)]
    Clock(#[from] ClockError),
}

/// The agent, or this process alone on the agent's store.
#[derive(Debug)]
pub enum Allocator {
    /// It answered.
    Agent(Client),
    /// Nobody listened; the store is open until this is dropped.
    Alone(Box<IpamService>),
}

impl Allocator {
    /// The agent; alone only if nobody listens at its socket. An agent that listens and fails is not gone round: it has the store.
    pub fn open(config: &Config) -> Result<Self, AllocatorError> {
        match Client::connect(&config.agent.socket) {
            Ok(client) => Ok(Self::Agent(client)),
            Err(ClientError::NoAgent { .. }) => {
                let service = IpamService::open_within(
                    &config.agent.state_dir,
                    config,
                    clock::boot()?,
                    clock::now(),
                    STORE_WITHIN,
                )?;
                Ok(Self::Alone(Box::new(service)))
            }
            Err(e) => Err(e.into()),
        }
    }

    /// One request, one answer.
    pub fn ask(&mut self, request: &Request) -> Result<Response, AllocatorError> {
        match self {
            Self::Agent(client) => Ok(client.ask(request)?),
            Self::Alone(service) => Ok(service.handle(request, clock::now())),
        }
    }

    /// [`Allocator::ask`] for a slot. Alone, one that cannot be had for want of a block or of evidence is asked for again once the
    /// listed blocks were taken and the evidence was gathered; an agent does so by itself. The second part: why that could not be done.
    ///
    /// Alone there is no meanwhile: others wait for the store.
    pub(crate) fn ask_for_slot(
        &mut self,
        request: &Request,
        config: &Config,
        meanwhile: Option<Meanwhile<'_>>,
    ) -> Result<(Response, Option<String>), AllocatorError> {
        let mut answer = match self {
            Self::Agent(client) => ask_meanwhile(client, request, meanwhile)?,
            Self::Alone(service) => {
                // An agent has looked when it began. Nobody else has the store meanwhile: what stands, it must know of.
                service.believe_all(clock::now())?;
                service.handle(request, clock::now())
            }
        };
        if let Self::Alone(service) = self
            && lacks_slots(&answer)
        {
            match alone::take_listed(service, config, clock::now()) {
                Ok(true) => answer = self.ask(request)?,
                Ok(false) => {}
                Err(error) => return Ok((answer, Some(error.to_string()))),
            }
        }
        let service = match self {
            Self::Alone(service) if lacks_evidence(&answer) => service,
            Self::Alone(_) | Self::Agent(_) => return Ok((answer, None)),
        };
        match alone::gather(service, config, clock::now()) {
            Ok(()) => Ok((self.ask(request)?, None)),
            Err(error) => Ok((answer, Some(error.to_string()))),
        }
    }
}

/// Asks for a slot and, where the pod does not say its class, in the same breath for that: an agent knows it at once, while the slot
/// has to be made durable. One of an earlier version knows no such question; then it is learnt with the slot.
fn ask_meanwhile(
    client: &mut Client,
    request: &Request,
    meanwhile: Option<Meanwhile<'_>>,
) -> Result<Response, ClientError> {
    let Request::Allocate { class, pod, .. } = request else {
        return client.ask(request);
    };
    match (meanwhile, class) {
        (None, _) => client.ask(request),
        (Some(meanwhile), Some(class)) => {
            client.send(&[request])?;
            meanwhile(Some(*class));
            client.receive()
        }
        (Some(meanwhile), None) => {
            let namespace = pod.namespace.clone();
            client.send(&[&Request::Class { namespace }, request])?;
            meanwhile(None);
            let first = client.receive()?;
            if let Response::Class { class } = first {
                meanwhile(Some(class));
            }
            match client.receive() {
                // It had one word for both, and hung up.
                Err(ClientError::Broken(_)) if matches!(first, Response::Failed { .. }) => {
                    Ok(first)
                }
                answer => answer,
            }
        }
    }
}

/// The blocks that are known do not have it.
fn lacks_slots(answer: &Response) -> bool {
    match answer {
        Response::Exhausted { .. } | Response::Elsewhere { .. } => true,
        Response::Unavailable { because, .. } => *because == Unavailable::NotOurs,
        Response::Capacity { free, .. } => *free == 0,
        _ => false,
    }
}

/// Slots have rested, and nobody looked whether they are forgotten.
fn lacks_evidence(answer: &Response) -> bool {
    match answer {
        Response::Exhausted { exhausted } => exhausted.waiting + exhausted.quarantined > 0,
        Response::Unavailable { because, .. } => {
            *because == Unavailable::Cooling { free_in_secs: None }
        }
        Response::Capacity { cooling, free, .. } => *free == 0 && *cooling > 0,
        _ => false,
    }
}

impl From<AllocatorError> for Failure {
    fn from(e: AllocatorError) -> Self {
        let code = match &e {
            AllocatorError::Agent(_) => Code::TryAgainLater,
            AllocatorError::Ipam(IpamError::Store(
                StoreError::Damaged { .. } | StoreError::Lost { .. } | StoreError::Older { .. },
            )) => Code::StoreDamaged,
            AllocatorError::Ipam(
                IpamError::Store(StoreError::Busy { .. }) | IpamError::Overloaded,
            ) => Code::TryAgainLater,
            AllocatorError::Ipam(
                IpamError::Store(StoreError::Directory { .. } | StoreError::Io { .. })
                | IpamError::TooManyBlocks { .. },
            )
            | AllocatorError::Clock(_) => Code::Io,
        };
        Failure::new(code, e)
    }
}

impl From<SpoolError> for Failure {
    fn from(e: SpoolError) -> Self {
        Failure::new(Code::Io, e)
    }
}
