//! Objects of the API server, read by the rules of manifests, and Leases, which only the API has.

use std::sync::Arc;

use kun_config::Faults;
use kun_config::yaml::{Cursor, Fields, Node as Tree, Sink};

use super::{Interner, Manifest, Reader, Writer};
use crate::crd::How;
use crate::{Kind, Lease, Object};

/// What came of one object of the API.
#[derive(Debug)]
pub struct Reading {
    /// The object; `None` without faults: none that kun reads, such as a slice of no service.
    pub object: Option<Object>,
    /// What is wrong with it. Of kinds that are Kubernetes' own the API server is the judge: a value that kun does not know is
    /// left out with the part that it makes unusable (a port, an address), and the rest is used.
    pub faults: Faults,
}

/// Reads one object of an API answer by the same rules as a manifest; `title` names it in faults.
pub fn read_api(names: &mut Interner, kind: Kind, title: &str, tree: &Tree<'_>) -> Reading {
    let sink = Sink::new(title);
    let mut reader = Reader {
        writer: Writer::Server,
        how: How::API,
        names,
        manifest: Manifest::default(),
    };
    reader.document(tree, &sink);
    let (mut faults, _) = sink.into_parts();
    // An answer has no lines; a path says it all.
    faults.0.iter_mut().for_each(|fault| fault.at = None);
    let object = reader.manifest.objects.pop();
    let object = object.filter(|_| faults.0.is_empty() || !crate::Resource::of(kind).is_ours());
    Reading { object, faults }
}

impl Reader<'_> {
    pub(super) fn lease(&mut self, f: &Fields<'_, '_>, line: u32) -> Option<Lease> {
        let meta = self.meta(f, line, true)?;
        let mut lease = Lease {
            meta,
            holder: None,
            duration_secs: None,
            acquire_time: None,
            renew_time: None,
            transitions: 0,
        };
        if let Some(spec) = f.get("spec") {
            let spec = spec.fields();
            let text = |field| {
                let text = spec.get(field).and_then(|c: Cursor<'_, '_>| c.text())?;
                (!text.is_empty()).then(|| Arc::from(text))
            };
            lease.holder = text("holderIdentity");
            lease.acquire_time = text("acquireTime");
            lease.renew_time = text("renewTime");
            let count = |field| {
                let c: Cursor<'_, '_> = spec.get(field)?;
                c.count(0, i32::MAX as u32)
            };
            lease.duration_secs = count("leaseDurationSeconds");
            lease.transitions = count("leaseTransitions").unwrap_or_default();
        }
        Some(lease)
    }
}
