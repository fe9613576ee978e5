package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// readyWithin bounds the wait for each part: ready in about 5 s on two idle cores, so a minute means that it hangs.
const readyWithin = 90 * time.Second

// options of `serve`.
type options struct {
	dir, bind string
	port      int
	services  string
	pods      string
	nodes     string
	scheduler bool
	apiserver string
}

// ready is the one line that `serve` prints.
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
	flags.StringVar(&o.dir, "dir", "", "directory for data, certificates and logs (required; removed by the caller)")
	flags.StringVar(&o.bind, "bind", "127.0.0.1", "address of the API server")
	flags.IntVar(&o.port, "port", 0, "port of the API server; 0 takes a free one")
	flags.StringVar(&o.services, "service-cidr", "10.96.0.0/16,fd00:10:96::/112", "ranges of ClusterIPs")
	flags.StringVar(&o.pods, "pod-cidr", "10.244.0.0/16,fd00:10:244::/56", "ranges of pods, for the node CIDR controller")
	flags.StringVar(&o.nodes, "nodes", "", "nodes to issue kubelet certificates for, comma separated")
	flags.BoolVar(&o.scheduler, "scheduler", false, "run kube-scheduler too")
	flags.StringVar(&o.apiserver, "apiserver-flags", "", "further flags of kube-apiserver, space separated")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if o.dir == "" {
		fmt.Fprintln(os.Stderr, self+": serve needs --dir")
		return 2
	}
	runtime.LockOSThread() // Pdeathsig fires when the thread that forked ends: this one ends with the process
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	go func() { // whoever started us is gone when our standard input is
		_, _ = io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	if err := run(ctx, o); err != nil && !errors.Is(err, context.Canceled) {
		fmt.Fprintln(os.Stderr, self+": "+err.Error())
		return 1
	}
	return 0
}

func run(ctx context.Context, o options) error {
	dir, err := filepath.Abs(o.dir)
	if err != nil {
		return err
	}
	ports, err := freePorts(o.bind, 5)
	if err != nil {
		return err
	}
	if o.port != 0 {
		ports[0] = o.port
	}
	server := "https://" + net.JoinHostPort(o.bind, fmt.Sprint(ports[0]))
	certificates, configs, err := credentials(dir, server, o)
	if err != nil {
		return err
	}
	c := &children{dir: dir, pids: map[string]int{}, died: make(chan error, 8)}
	defer c.stop()

	etcd := fmt.Sprintf("http://127.0.0.1:%d", ports[1])
	peer := fmt.Sprintf("http://127.0.0.1:%d", ports[2])
	// The data is thrown away with the test: fsync would only measure the disk.
	if err := c.start("etcd", "--name=test", "--data-dir="+filepath.Join(dir, "etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls="+etcd, "--advertise-client-urls="+etcd, "--listen-peer-urls="+peer,
		"--initial-advertise-peer-urls="+peer, "--initial-cluster=test="+peer); err != nil {
		return err
	}
	if err := c.wait(ctx, "etcd", http.DefaultClient, etcd+"/health"); err != nil {
		return err
	}

	pem := certificates.path
	flags := []string{"--etcd-servers=" + etcd, "--bind-address=" + o.bind, fmt.Sprintf("--secure-port=%d", ports[0]),
		"--tls-cert-file=" + pem("apiserver.crt"), "--tls-private-key-file=" + pem("apiserver.key"), "--client-ca-file=" + pem("ca.crt"),
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local", "--service-account-key-file=" + pem("sa.pub"),
		"--service-account-signing-key-file=" + pem("sa.key"), "--kubelet-client-certificate=" + pem("apiserver-kubelet.crt"),
		"--kubelet-client-key=" + pem("apiserver-kubelet.key"), "--kubelet-preferred-address-types=InternalIP,Hostname",
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
		"--service-cluster-ip-range=" + o.services, "--profiling=false", "--v=1"}
	if a, err := netip.ParseAddr(o.bind); err == nil && a.IsLoopback() {
		// A loopback address cannot be an endpoint of Service kubernetes.
		flags = append(flags, "--endpoint-reconciler-type=none")
	} else {
		flags = append(flags, "--advertise-address="+o.bind, "--endpoint-reconciler-type=lease")
	}
	flags = append(flags, strings.Fields(o.apiserver)...)
	if err := c.start("kube-apiserver", flags...); err != nil {
		return err
	}
	client, err := certificates.client("admin")
	if err != nil {
		return err
	}
	if err := c.wait(ctx, "kube-apiserver", client, server+"/readyz"); err != nil {
		return err
	}

	if err := c.start("kube-controller-manager", "--kubeconfig="+configs["kube-controller-manager"], "--leader-elect=false",
		"--use-service-account-credentials=true", "--service-account-private-key-file="+pem("sa.key"), "--root-ca-file="+pem("ca.crt"),
		"--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", ports[3]), "--allocate-node-cidrs=true", "--cluster-cidr="+o.pods,
		"--service-cluster-ip-range="+o.services, "--node-cidr-mask-size-ipv4=24", "--node-cidr-mask-size-ipv6=64", "--v=1"); err != nil {
		return err
	}
	if o.scheduler {
		if err := c.start("kube-scheduler", "--kubeconfig="+configs["kube-scheduler"], "--leader-elect=false",
			"--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", ports[4]), "--v=1"); err != nil {
			return err
		}
	}
	// A ServiceAccount in `default` shows that the controllers run.
	if err := c.wait(ctx, "kube-controller-manager", client, server+"/api/v1/namespaces/default/serviceaccounts/default"); err != nil {
		return err
	}

	nodes := map[string]string{}
	for _, n := range splitList(o.nodes) {
		nodes[n] = configs[n]
	}
	line, err := json.Marshal(ready{Server: server, Kubeconfig: configs["admin"], CA: pem("ca.crt"), Nodes: nodes, Pids: c.pids})
	if err != nil {
		return err
	}
	fmt.Println(string(line))
	select {
	case <-ctx.Done():
		return nil
	case err := <-c.died:
		return err
	}
}

// credentials makes the authority, a certificate and a kubeconfig for everybody.
func credentials(dir, server string, o options) (*pki, map[string]string, error) {
	p, err := newPKI(filepath.Join(dir, "pki"))
	if err != nil {
		return nil, nil, err
	}
	apiserver := identity{user: "kube-apiserver",
		names: []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
		ips:   []net.IP{net.ParseIP("127.0.0.1"), net.IPv6loopback, net.ParseIP(o.bind)}}
	for _, cidr := range splitList(o.services) {
		prefix, err := netip.ParsePrefix(cidr)
		if err != nil {
			return nil, nil, fmt.Errorf("--service-cidr: %w", err)
		}
		apiserver.ips = append(apiserver.ips, net.IP(prefix.Masked().Addr().Next().AsSlice()))
	}
	holders := map[string]identity{
		"apiserver":               apiserver,
		"apiserver-kubelet":       {user: "apiserver-kubelet-client", groups: []string{"system:masters"}},
		"admin":                   {user: "admin", groups: []string{"system:masters"}},
		"kube-controller-manager": {user: "system:kube-controller-manager"},
		"kube-scheduler":          {user: "system:kube-scheduler"},
	}
	for _, n := range splitList(o.nodes) {
		holders[n] = identity{user: "system:node:" + n, groups: []string{"system:nodes"}}
	}
	configs := map[string]string{}
	for name, id := range holders {
		if err := p.issue(name, id); err != nil {
			return nil, nil, err
		}
		if configs[name], err = p.kubeconfig(name, server); err != nil {
			return nil, nil, err
		}
	}
	return p, configs, p.signingKey("sa")
}

// client is an HTTP client that presents the certificate NAME.
func (p *pki) client(name string) (*http.Client, error) {
	pair, err := tls.LoadX509KeyPair(p.path(name+".crt"), p.path(name+".key"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(p.cert)
	return &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}}}, nil
}

// children are the processes that this one started; they die with it.
type children struct {
	dir     string
	running []*exec.Cmd
	pids    map[string]int
	died    chan error
	ended   sync.WaitGroup
}

func (c *children) log(name string) string { return filepath.Join(c.dir, name+".log") }

func (c *children) start(name string, flags ...string) error {
	log, err := os.Create(c.log(name))
	if err != nil {
		return err
	}
	defer log.Close()
	executable, err := os.Executable()
	if err != nil {
		return err
	}
	command := exec.Command(executable, append([]string{name}, flags...)...)
	command.Args[0] = self
	command.Stdout, command.Stderr = log, log
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := command.Start(); err != nil {
		return err
	}
	c.running = append(c.running, command)
	c.pids[name] = command.Process.Pid
	c.ended.Add(1)
	go func() {
		defer c.ended.Done()
		err := command.Wait()
		c.died <- fmt.Errorf("%s ended (%v): %s", name, err, c.lastLine(name))
	}()
	return nil
}

// wait polls until the URL answers 200.
func (c *children) wait(ctx context.Context, name string, client *http.Client, url string) error {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		if answer, err := client.Do(request); err == nil {
			answer.Body.Close()
			if answer.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case err := <-c.died:
			return err
		case <-ctx.Done():
			return fmt.Errorf("%s was not ready in time: %w; last words: %s", name, ctx.Err(), c.lastLine(name))
		case <-tick.C:
		}
	}
}

func (c *children) lastLine(name string) string {
	file, err := os.Open(c.log(name))
	if err != nil {
		return err.Error()
	}
	defer file.Close()
	last := ""
	for lines := bufio.NewScanner(file); lines.Scan(); {
		last = lines.Text()
	}
	return last
}

// stop kills them, last first, and returns when they are gone: there is no state worth a graceful end.
func (c *children) stop() {
	for i := len(c.running) - 1; i >= 0; i-- {
		_ = c.running[i].Process.Kill()
	}
	c.ended.Wait()
}

// freePorts asks the kernel for n ports that nobody has.
func freePorts(bind string, n int) ([]int, error) {
	ports := make([]int, n)
	for i := range ports {
		host := bind
		if i > 0 {
			host = "127.0.0.1"
		}
		l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
		if err != nil {
			return nil, err
		}
		defer l.Close()
		ports[i] = l.Addr().(*net.TCPAddr).Port
	}
	return ports, nil
}

func splitList(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' })
}
