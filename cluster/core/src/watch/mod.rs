//! The watch protocol of the Kubernetes API.
