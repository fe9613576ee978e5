// Command kun-control-plane is a Kubernetes control plane for tests, in one binary.
//
// `kun-control-plane serve` brings up etcd, kube-apiserver and kube-controller-manager (and kube-scheduler on request) as
// children of its own, prints one JSON line once the API server is ready, and takes everything down on SIGTERM or when
// its standard input closes, so that no test that dies leaves a server behind. Lines on its standard input are commands (control.go:
// kill, freeze and start parts, add a second API server, compact etcd, issue a token), each answered with one JSON line. Any other
// first argument (or the name that it is executed by) is the Kubernetes program of that name: `kun-control-plane kubectl get nodes`.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	_ "time/tzdata"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	manager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

const self = "kun-control-plane"

func main() {
	name := filepath.Base(os.Args[0])
	if name == self {
		if len(os.Args) < 2 {
			fmt.Fprintln(os.Stderr, "usage: "+self+" serve|etcd|kube-apiserver|kube-controller-manager|kube-scheduler|kubelet|kubectl [flag…]")
			os.Exit(2)
		}
		name = os.Args[1]
		os.Args = os.Args[1:]
	}
	var command *cobra.Command
	switch name {
	case "serve":
		os.Exit(serve(os.Args[1:]))
	case "etcd":
		etcdmain.Main(os.Args)
		return
	case "kube-apiserver":
		command = apiserver.NewAPIServerCommand()
	case "kube-controller-manager":
		command = manager.NewControllerManagerCommand()
	case "kube-scheduler":
		command = scheduler.NewSchedulerCommand()
	case "kubelet":
		command = kubelet.NewKubeletCommand(context.Background())
	case "kubectl":
		command = kubectl.NewDefaultKubectlCommand()
	default:
		fmt.Fprintf(os.Stderr, "%s: there is no program %q in here\n", self, name)
		os.Exit(2)
	}
	os.Exit(cli.Run(command))
}
