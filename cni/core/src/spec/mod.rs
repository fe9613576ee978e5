//! The CNI specification's shapes, 0.3.0 to 1.1.0: environment, configuration, results and errors. Parsed here and nowhere
//! else; what follows works on types that cannot be wrong.

mod config;
mod conventions;
mod env;
mod failure;
mod quantity;
mod result;
mod version;

pub use config::{AttachmentId, ConfigError, DEFAULT_KUN_CONFIG, IpamOptions, NetworkConfig, Role};
pub use conventions::{
    AddressRange, IPS_ANNOTATION, IPV4_ANNOTATION, PortMapping, RateLimit, Transport, Wishes,
};
pub use env::{Attachment, EnvError, Invocation, parse as parse_environment};
pub(crate) use env::{MAX_IDENTIFIER, MAX_IFNAME};
pub use failure::{Code, Failure};
pub use result::{Interface, Ip, ResultError, Route, Success};
pub use version::{UnsupportedVersion, Version};
