package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// readyWithin bounds the wait for each part: ready in about 5 s on two idle cores, so longer means that it hangs.
const readyWithin = 90 * time.Second

// obeysWithin bounds the wait for what a signal does: an API server that ends gives open connections a minute.
const obeysWithin = 75 * time.Second

// probe is a URL that answers 200 when its server is ready.
type probe struct {
	client *http.Client
	url    string
}

// unverified is a client for the health endpoints of controllers, which serve a certificate of their own making.
func unverified() *http.Client {
	return &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
}

// child is a program that this process runs, stops and runs again.
type child struct {
	name  string
	flags []string
	ready probe
	now   *process
}

// process is one run of a child.
type process struct {
	command *exec.Cmd
	// gone is closed when it has ended and was waited for.
	gone chan struct{}
	// serving: it is ready and nobody has asked it to end, so that its end is a fault.
	serving atomic.Bool
}

// children are the processes that this one started; they die with it.
type children struct {
	dir  string
	all  []*child
	died chan error
}

func (c *children) log(name string) string { return filepath.Join(c.dir, name+".log") }

func (c *children) add(name string, ready probe, flags ...string) {
	// Flags are appended to later: a slice that two children share must not be written through.
	c.all = append(c.all, &child{name: name, ready: ready, flags: append([]string(nil), flags...)})
}

func (c *children) find(name string) (*child, error) {
	names := make([]string, len(c.all))
	for i, child := range c.all {
		if child.name == name {
			return child, nil
		}
		names[i] = child.name
	}
	return nil, fmt.Errorf("there is no %q; there are %s", name, strings.Join(names, ", "))
}

// running gives the process of a child that runs.
func (c *children) running(name string) (*process, error) {
	child, err := c.find(name)
	if err != nil {
		return nil, err
	}
	if child.now == nil {
		return nil, fmt.Errorf("%s does not run", name)
	}
	return child.now, nil
}

func (c *children) pids() map[string]int {
	pids := map[string]int{}
	for _, child := range c.all {
		if child.now != nil {
			pids[child.name] = child.now.command.Process.Pid
		}
	}
	return pids
}

// start runs it, with further flags for this run, and returns when it is ready. Must be called from the main thread.
func (c *children) start(ctx context.Context, name string, further ...string) error {
	child, err := c.find(name)
	if err != nil {
		return err
	}
	if child.now != nil {
		return fmt.Errorf("%s runs already", name)
	}
	log, err := os.OpenFile(c.log(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	executable, err := os.Executable()
	if err != nil {
		return err
	}
	program := strings.TrimSuffix(name, "-2")
	command := exec.Command(executable, append(append([]string{program}, child.flags...), further...)...)
	command.Args[0] = self
	command.Stdout, command.Stderr = log, log
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := command.Start(); err != nil {
		return err
	}
	now := &process{command: command, gone: make(chan struct{})}
	child.now = now
	go func() {
		err := command.Wait()
		close(now.gone)
		if now.serving.Load() {
			select {
			case c.died <- c.ended(name, err):
			default: // the first is enough
			}
		}
	}()
	if err := c.wait(ctx, name, child.ready); err != nil {
		_ = c.end(name, syscall.SIGKILL)
		return err
	}
	now.serving.Store(true)
	return nil
}

func (c *children) ended(name string, err error) error {
	return fmt.Errorf("%s ended (%v): %s", name, err, c.lastLine(name))
}

// end sends a signal that ends it, and returns when it is gone.
func (c *children) end(name string, signal syscall.Signal) error {
	child, err := c.find(name)
	if err != nil {
		return err
	}
	now := child.now
	if now == nil {
		return fmt.Errorf("%s does not run", name)
	}
	now.serving.Store(false)
	child.now = nil
	_ = now.command.Process.Signal(signal)
	select {
	case <-now.gone:
		return nil
	case <-time.After(obeysWithin):
		_ = now.command.Process.Kill()
		<-now.gone
		return fmt.Errorf("%s did not end within %v of %v, and was killed", name, obeysWithin, signal)
	}
}

// freeze stops its execution; returns when the kernel has.
func (c *children) freeze(name string) error {
	now, err := c.running(name)
	if err != nil {
		return err
	}
	if err := now.command.Process.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	for end := time.Now().Add(obeysWithin); time.Now().Before(end); time.Sleep(time.Millisecond) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", now.command.Process.Pid))
		if err != nil {
			return err
		}
		if _, state, _ := strings.Cut(string(stat), ") "); strings.HasPrefix(state, "T") {
			return nil
		}
	}
	return fmt.Errorf("%s did not stop", name)
}

func (c *children) thaw(name string) error {
	now, err := c.running(name)
	if err != nil {
		return err
	}
	return now.command.Process.Signal(syscall.SIGCONT)
}

// wait polls until the probe answers 200.
func (c *children) wait(ctx context.Context, name string, ready probe) error {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	now, err := c.running(name)
	if err != nil {
		return err
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, ready.url, nil)
		if err != nil {
			return err
		}
		if answer, err := ready.client.Do(request); err == nil {
			answer.Body.Close()
			if answer.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-now.gone:
			return fmt.Errorf("%s ended (%v): %s", name, now.command.ProcessState, c.lastLine(name))
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
		if text := strings.TrimSpace(lines.Text()); text != "" {
			last = text
		}
	}
	return last
}

// stop kills them, last first, and returns when they are gone: there is no state worth a graceful end.
func (c *children) stop() {
	for i := len(c.all) - 1; i >= 0; i-- {
		if now := c.all[i].now; now != nil {
			now.serving.Store(false)
			_ = now.command.Process.Kill()
		}
	}
	for _, child := range c.all {
		if child.now != nil {
			<-child.now.gone
		}
	}
}
