package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// Names of what runs. A second API server is made by `add kube-apiserver`.
const (
	etcdName      = "etcd"
	apiserverName = "kube-apiserver"
	secondName    = "kube-apiserver-2"
	managerName   = "kube-controller-manager"
	schedulerName = "kube-scheduler"
)

// options of `serve`.
type options struct {
	dir, bind, advertise         string
	port                         int
	services, pods, nodes, names string
	scheduler, remove            bool
	apiserver, controllers       string
}

// ready is the first line that `serve` prints.
type ready struct {
	Server     string            `json:"server"`
	Kubeconfig string            `json:"kubeconfig"`
	CA         string            `json:"ca"`
	Nodes      map[string]string `json:"nodeKubeconfigs"`
	Pids       map[string]int    `json:"pids"`
}

func serve(args []string) int {
	var o options
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	flags.StringVar(&o.dir, "dir", "", "directory for data, certificates and logs (required)")
	flags.BoolVar(&o.remove, "remove", false, "remove the directory at the end")
	flags.StringVar(&o.bind, "bind", "127.0.0.1", "address of the API server, IPv4 or IPv6; :: with --advertise for both families")
	flags.StringVar(&o.advertise, "advertise", "", "address that clients and Service kubernetes use, if not that of --bind")
	flags.IntVar(&o.port, "port", 0, "port of the API server; 0 takes a free one")
	flags.StringVar(&o.services, "service-cidr", "10.96.0.0/16,fd00:10:96::/112", "ranges of ClusterIPs; the first is of the family of the API server's address")
	flags.StringVar(&o.pods, "pod-cidr", "10.244.0.0/16,fd00:10:244::/56", "ranges of pods, for the node CIDR controller; empty: nodes get none")
	flags.StringVar(&o.nodes, "nodes", "", "nodes to issue kubelet certificates for, comma separated")
	flags.StringVar(&o.names, "san", "", "further names and addresses in the API server's certificate, comma separated")
	flags.BoolVar(&o.scheduler, "scheduler", false, "run kube-scheduler too")
	flags.StringVar(&o.apiserver, "apiserver-flags", "", "further flags of kube-apiserver, space separated")
	flags.StringVar(&o.controllers, "controller-flags", "", "further flags of kube-controller-manager, space separated")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if o.dir == "" {
		fmt.Fprintln(os.Stderr, self+": serve needs --dir")
		return 2
	}
	if o.advertise == "" {
		o.advertise = o.bind
	}
	dir, err := filepath.Abs(o.dir)
	if err != nil {
		fmt.Fprintln(os.Stderr, self+": "+err.Error())
		return 1
	}
	o.dir = dir
	runtime.LockOSThread() // Pdeathsig fires when the thread that forked ends: this one ends with the process
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if o.remove {
		defer os.RemoveAll(dir)
	}
	if err := run(ctx, stop, o); err != nil && !errors.Is(err, context.Canceled) {
		say(answer{Error: err.Error()})
		fmt.Fprintln(os.Stderr, self+": "+err.Error())
		return 1
	}
	return 0
}

// say prints one line of JSON.
func say(value any) {
	if line, err := json.Marshal(value); err == nil {
		fmt.Println(string(line))
	}
}

func run(ctx context.Context, stop context.CancelFunc, o options) error {
	ports, err := freePorts(o.bind, o.port)
	if err != nil {
		return err
	}
	url := func(port int) string { return "https://" + net.JoinHostPort(o.advertise, fmt.Sprint(port)) }
	certificates, configs, err := credentials(url(ports.api), o)
	if err != nil {
		return err
	}
	admin, err := certificates.client("admin")
	if err != nil {
		return err
	}
	c := &children{dir: o.dir, died: make(chan error, 1)}
	defer c.stop()
	p := &plane{children: c, pki: certificates, admin: admin, server: url(ports.api), etcd: fmt.Sprintf("http://127.0.0.1:%d", ports.etcd), stop: stop}
	lines := p.listen(ctx)

	peer := fmt.Sprintf("http://127.0.0.1:%d", ports.peer)
	// The data is thrown away with the test: fsync would only measure the disk.
	c.add(etcdName, probe{http.DefaultClient, p.etcd + "/health"}, "--name=test", "--data-dir="+filepath.Join(o.dir, "etcd"),
		"--unsafe-no-fsync", "--log-level=warn", "--listen-client-urls="+p.etcd, "--advertise-client-urls="+p.etcd,
		"--listen-peer-urls="+peer, "--initial-advertise-peer-urls="+peer, "--initial-cluster=test="+peer)
	flags, err := apiserverFlags(certificates.path, p.etcd, o)
	if err != nil {
		return err
	}
	port := func(n int) string { return fmt.Sprintf("--secure-port=%d", n) }
	c.add(apiserverName, probe{admin, url(ports.api) + "/readyz"}, append(flags, port(ports.api))...)
	c.add(secondName, probe{admin, url(ports.second) + "/readyz"}, append(flags, port(ports.second))...)
	p.second, p.secondConfig = url(ports.second), func() (string, error) {
		return certificates.kubeconfig(secondName, "admin", url(ports.second))
	}
	pem := certificates.path
	flags = []string{"--kubeconfig=" + configs[managerName], "--leader-elect=false", "--use-service-account-credentials=true",
		"--service-account-private-key-file=" + pem("sa.key"), "--root-ca-file=" + pem("ca.crt"), "--bind-address=127.0.0.1",
		port(ports.manager), "--service-cluster-ip-range=" + o.services, "--v=1"}
	if o.pods != "" {
		flags = append(flags, "--allocate-node-cidrs=true", "--cluster-cidr="+o.pods)
		flags = append(flags, nodeMasks(o.pods)...)
	}
	flags = append(flags, strings.Fields(o.controllers)...)
	c.add(managerName, probe{unverified(), fmt.Sprintf("https://127.0.0.1:%d/healthz", ports.manager)}, flags...)
	c.add(schedulerName, probe{unverified(), fmt.Sprintf("https://127.0.0.1:%d/healthz", ports.scheduler)},
		"--kubeconfig="+configs[schedulerName], "--leader-elect=false", "--bind-address=127.0.0.1", port(ports.scheduler), "--v=1")

	parts := []string{etcdName, apiserverName, managerName}
	if o.scheduler {
		parts = append(parts, schedulerName)
	}
	for _, name := range parts {
		if err := c.start(ctx, name); err != nil {
			return err
		}
	}
	// A ServiceAccount in `default` shows that the controllers act.
	account := probe{admin, p.server + "/api/v1/namespaces/default/serviceaccounts/default"}
	if err := c.wait(ctx, managerName, account); err != nil {
		return err
	}

	nodes := map[string]string{}
	for _, n := range splitList(o.nodes) {
		nodes[n] = configs[n]
	}
	say(ready{Server: p.server, Kubeconfig: configs["admin"], CA: pem("ca.crt"), Nodes: nodes, Pids: c.pids()})
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-c.died:
			return err
		case line := <-lines:
			say(p.obey(ctx, line))
		}
	}
}

// listen reads lines of standard input; when it ends, whoever started us is gone.
func (p *plane) listen(ctx context.Context) <-chan string {
	lines := make(chan string)
	go func() {
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			select {
			case lines <- in.Text():
			case <-ctx.Done():
				return
			}
		}
		if !p.kept.Load() {
			p.stop()
		}
	}()
	return lines
}

func apiserverFlags(pem func(string) string, etcd string, o options) ([]string, error) {
	advertised, err := netip.ParseAddr(o.advertise)
	if err != nil {
		return nil, fmt.Errorf("--bind, --advertise: %w", err)
	}
	flags := []string{"--etcd-servers=" + etcd, "--bind-address=" + o.bind,
		"--tls-cert-file=" + pem("apiserver.crt"), "--tls-private-key-file=" + pem("apiserver.key"), "--client-ca-file=" + pem("ca.crt"),
		"--service-account-issuer=" + issuer, "--service-account-key-file=" + pem("sa.pub"),
		"--service-account-signing-key-file=" + pem("sa.key"), "--kubelet-client-certificate=" + pem("apiserver-kubelet.crt"),
		"--kubelet-client-key=" + pem("apiserver-kubelet.key"), "--kubelet-preferred-address-types=InternalIP,Hostname",
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
		"--service-cluster-ip-range=" + o.services, "--profiling=false", "--v=1",
		// Without it a server that is asked to end keeps its watches open for a minute.
		"--shutdown-watch-termination-grace-period=2s"}
	if !advertised.IsLoopback() {
		flags = append(flags, "--advertise-address="+o.advertise, "--endpoint-reconciler-type=lease")
	} else {
		// A loopback address cannot be an endpoint of Service kubernetes, so there is none. The server asks for an address all
		// the same, of the family of the first service range; a namespace without routes has none to find.
		documentation := "192.0.2.1"
		if strings.Contains(strings.Split(o.services, ",")[0], ":") {
			documentation = "2001:db8::1"
		}
		flags = append(flags, "--advertise-address="+documentation, "--endpoint-reconciler-type=none")
	}
	return append(flags, strings.Fields(o.apiserver)...), nil
}

// nodeMasks gives each node a /24 and a /64, of the families that the pods have; one range alone has a flag of its own name.
func nodeMasks(pods string) []string {
	ranges := splitList(pods)
	mask := func(cidr string) string {
		if strings.Contains(cidr, ":") {
			return "64"
		}
		return "24"
	}
	if len(ranges) == 1 {
		return []string{"--node-cidr-mask-size=" + mask(ranges[0])}
	}
	return []string{"--node-cidr-mask-size-ipv4=24", "--node-cidr-mask-size-ipv6=64"}
}

// credentials makes the authority, a certificate and a kubeconfig for everybody.
func credentials(server string, o options) (*pki, map[string]string, error) {
	p, err := newPKI(filepath.Join(o.dir, "pki"))
	if err != nil {
		return nil, nil, err
	}
	apiserver := identity{user: apiserverName,
		names: []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
		ips:   []net.IP{net.ParseIP("127.0.0.1"), net.IPv6loopback}}
	for _, name := range append(splitList(o.names), o.bind, o.advertise) {
		if ip := net.ParseIP(name); ip != nil {
			apiserver.ips = append(apiserver.ips, ip)
		} else {
			apiserver.names = append(apiserver.names, name)
		}
	}
	for _, cidr := range splitList(o.services) {
		prefix, err := netip.ParsePrefix(cidr)
		if err != nil {
			return nil, nil, fmt.Errorf("--service-cidr: %w", err)
		}
		apiserver.ips = append(apiserver.ips, net.IP(prefix.Masked().Addr().Next().AsSlice()))
	}
	holders := map[string]identity{
		"apiserver":         apiserver,
		"apiserver-kubelet": {user: "apiserver-kubelet-client", groups: []string{"system:masters"}},
		"admin":             {user: "admin", groups: []string{"system:masters"}},
		managerName:         {user: "system:kube-controller-manager"},
		schedulerName:       {user: "system:kube-scheduler"},
	}
	for _, n := range splitList(o.nodes) {
		holders[n] = identity{user: "system:node:" + n, groups: []string{"system:nodes"}}
	}
	configs := map[string]string{}
	for name, id := range holders {
		if err := p.issue(name, id); err != nil {
			return nil, nil, err
		}
		if configs[name], err = p.kubeconfig(name, name, server); err != nil {
			return nil, nil, err
		}
	}
	return p, configs, p.signingKey("sa")
}

// ports that `serve` takes.
type ports struct{ api, second, etcd, peer, manager, scheduler int }

// freePorts finds ports that nobody has, below those that the kernel hands out: a client that dials a server which is away could
// be given the server's own port, and would keep it from coming back.
func freePorts(bind string, api int) (ports, error) {
	var found ports
	low, err := lowestEphemeral()
	if err != nil {
		return found, err
	}
	taken := map[int]bool{api: true}
	take := func(into *int, host string) error {
		for range 1000 {
			port := low/2 + rand.IntN(low/2)
			if taken[port] {
				continue
			}
			if l, err := net.Listen("tcp", net.JoinHostPort(host, fmt.Sprint(port))); err == nil {
				l.Close()
				taken[port], *into = true, port
				return nil
			}
		}
		return fmt.Errorf("%s: no free port between %d and %d", host, low/2, low)
	}
	const loopback = "127.0.0.1"
	found.api = api
	if api == 0 {
		err = take(&found.api, bind)
	}
	return found, errors.Join(err, take(&found.second, bind), take(&found.etcd, loopback), take(&found.peer, loopback),
		take(&found.manager, loopback), take(&found.scheduler, loopback))
}

// lowestEphemeral is the first port that the kernel gives to who asks for any.
func lowestEphemeral() (int, error) {
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return 0, err
	}
	var low int
	if _, err := fmt.Sscan(string(text), &low); err != nil {
		return 0, err
	}
	// A pod's range may begin anywhere; whoever begins it at 1024 has to live with the risk.
	return max(low, 16384), nil
}

func splitList(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' })
}
