//! Opening the API source fails on what a person has to mend, and names the file and what is missing; a server that does not answer is
//! no failure.

use std::path::Path;

use kun_cluster::api::ApiSource;

fn refusal(text: Option<&str>) -> (String, String) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("kubeconfig");
    if let Some(text) = text {
        std::fs::write(&path, text).expect("written");
    }
    let error = ApiSource::open(Some(&path)).expect_err("refused");
    (path.display().to_string(), error.to_string())
}

const WHOLE: &str = "apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: 'https://127.0.0.1:1'}}]\n\
    users: [{name: u, user: {}}]\ncontexts: [{name: x, context: {cluster: c, user: u}}]\n";

#[test]
fn what_is_missing_is_named_with_its_file() {
    let with = |more: &str| format!("{WHOLE}{more}");
    let cases = [
        (None, "mount it there"),
        (Some(WHOLE.to_owned()), "set `current-context`"),
        (Some(with("current-context: y\n")), "set `current-context`"),
        (
            Some(with("current-context: x\n").replace("server: 'https://127.0.0.1:1'", "")),
            "give the context a cluster with a `server`",
        ),
        (
            Some(with("current-context: x\n").replace("https://127.0.0.1:1", "https://[")),
            "write `server: https://host:port`",
        ),
        (
            Some(
                with("current-context: x\n")
                    .replace("server:", "certificate-authority: /nowhere, server:"),
            ),
            "certificate authority",
        ),
        (Some("- no kubeconfig".to_owned()), "write a kubeconfig"),
    ];
    for (text, right) in cases {
        let (path, told) = refusal(text.as_deref());
        assert!(
            told.contains(&path) && told.contains(right) && !told.contains('\n'),
            "{right}: {told}"
        );
    }
}

#[test]
fn outside_of_a_pod_a_kubeconfig_is_asked_for() {
    let told = ApiSource::open(None).expect_err("no pod").to_string();
    assert!(told.contains("set cluster.kubernetes.kubeconfig"), "{told}");
}

#[test]
fn a_server_that_does_not_answer_is_no_failure() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("kubeconfig");
    std::fs::write(&path, format!("{WHOLE}current-context: x\n")).expect("written");
    let open = |path: &Path| ApiSource::open(Some(path)).map(drop);
    open(&path).expect("opened");
}
