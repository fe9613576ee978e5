//! What every program does alike: load its configuration, check it on request, write logs, and answer `/metrics`, `/healthz` and
//! `/readyz`. Knows nothing of the domain.
//!
//! The order in a `main.rs`: [`load`] (or [`check_config`] and exit), [`init_logs`], [`Metrics::new`], register, [`serve`].

#![forbid(unsafe_code)]

mod http;
mod load;
mod logs;

pub use http::{Endpoint, Health, Metrics, ServeError, serve};
pub use load::{LoadError, check_config, load, load_with_text};
pub use logs::{LogsError, init_logs};
/// The registry that parts register their metrics in; names are `kun_<part>_…`.
pub use prometheus_client::registry::Registry;
