package main

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// usage is what a wrong command is answered with.
const usage = "kill NAME | terminate NAME | start NAME [FLAG…] | freeze NAME | thaw NAME | add kube-apiserver [FLAG…] | " +
	"compact | token NAMESPACE ACCOUNT SECONDS | keep"

// plane is what the commands act on.
type plane struct {
	children     *children
	pki          *pki
	admin        *http.Client
	server       string
	second       string
	secondConfig func() (string, error)
	etcd         string
	stop         context.CancelFunc
	// kept: goes on when standard input ends, until SIGTERM.
	kept atomic.Bool
}

// answer to a command, one line of JSON.
type answer struct {
	Error      string `json:"error,omitempty"`
	Pid        int    `json:"pid,omitempty"`
	Server     string `json:"server,omitempty"`
	Kubeconfig string `json:"kubeconfig,omitempty"`
	Token      string `json:"token,omitempty"`
	Revision   int64  `json:"revision,omitempty"`
}

// obey carries out one line of standard input.
func (p *plane) obey(ctx context.Context, line string) answer {
	words := strings.Fields(line)
	if len(words) == 0 {
		return answer{Error: usage}
	}
	answered, err := p.command(ctx, words[0], words[1:])
	if err != nil {
		return answer{Error: err.Error()}
	}
	return answered
}

func (p *plane) command(ctx context.Context, verb string, words []string) (answer, error) {
	switch {
	case verb == "kill" && len(words) == 1:
		return answer{}, p.children.end(words[0], syscall.SIGKILL)
	case verb == "terminate" && len(words) == 1:
		return answer{}, p.children.end(words[0], syscall.SIGTERM)
	case verb == "freeze" && len(words) == 1:
		return answer{}, p.children.freeze(words[0])
	case verb == "thaw" && len(words) == 1:
		return answer{}, p.children.thaw(words[0])
	case verb == "start" && len(words) >= 1:
		err := p.children.start(ctx, words[0], words[1:]...)
		return answer{Pid: p.children.pids()[words[0]]}, err
	case verb == "add" && len(words) >= 1 && words[0] == apiserverName:
		config, err := p.secondConfig()
		if err == nil {
			err = p.children.start(ctx, secondName, words[1:]...)
		}
		return answer{Pid: p.children.pids()[secondName], Server: p.second, Kubeconfig: config}, err
	case verb == "compact" && len(words) == 0:
		revision, err := p.compact(ctx)
		return answer{Revision: revision}, err
	case verb == "token" && len(words) == 3:
		token, err := p.token(ctx, words[0], words[1], words[2])
		return answer{Token: token}, err
	case verb == "keep" && len(words) == 0:
		p.kept.Store(true)
		return answer{}, nil
	}
	return answer{}, fmt.Errorf("%q: no such command; there are %s", strings.Join(append([]string{verb}, words...), " "), usage)
}

// compact makes etcd forget all history before now.
func (p *plane) compact(ctx context.Context) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, obeysWithin)
	defer cancel()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{p.etcd}, DialTimeout: 5 * time.Second, Context: ctx})
	if err != nil {
		return 0, err
	}
	defer client.Close()
	got, err := client.Get(ctx, "kun")
	if err != nil {
		return 0, err
	}
	_, err = client.Compact(ctx, got.Header.Revision, clientv3.WithCompactPhysical())
	return got.Header.Revision, err
}
