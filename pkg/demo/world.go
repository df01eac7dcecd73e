package demo

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sockmesh/sockmesh/pkg/lab"
)

// world is the demo's cluster: a client pod that is enrolled, and what it calls.
type world struct {
	o     Options
	lab   *lab.Lab
	agent *lab.Process

	client *lab.Pod
	// shop is the HTTP Service with the canary, kv and db the TCP ones, plain the one that no listener claims.
	shop, redis, db, plain lab.ServiceSpec
	// sources are all client addresses that servers reported.
	sources map[string]int
}

var enrolled = map[string]string{"sockmesh.io/enroll": "true"}

func newWorld(ctx context.Context, o Options) (*world, error) {
	l, err := lab.New(lab.Config{Binaries: o.Binaries, Helper: o.Helper})
	if err != nil {
		return nil, err
	}
	w := &world{o: o, lab: l, sources: map[string]int{}}
	ctx, cancel := context.WithTimeout(ctx, 45*time.Second)
	defer cancel()
	return w, w.build(ctx)
}

func (w *world) build(ctx context.Context) error {
	pods, err := w.pods("client", "v1", "v2", "redis-1", "redis-2", "db", "plain-1", "plain-2")
	if err != nil {
		return err
	}
	w.client = pods["client"]
	service := func(n int, name string, port, target uint16, backends ...string) lab.ServiceSpec {
		s := lab.ServiceSpec{
			Namespace: "shop", Name: name, Port: port, TargetPort: target,
			ClusterIPs: []netip.Addr{netip.MustParseAddr(fmt.Sprintf("10.96.0.%d", n)), netip.MustParseAddr(fmt.Sprintf("fd96::%d", n))},
		}
		for _, b := range backends {
			s.Backends = append(s.Backends, pods[b])
		}
		return s
	}
	w.shop = service(10, "shop", 80, 8080, "v1", "v2")
	w.redis = service(20, "redis", 6379, 6379, "redis-1", "redis-2")
	w.db = service(30, "db", 3306, 3306, "db")
	w.plain = service(40, "plain", 80, 8080, "plain-1", "plain-2")
	for _, s := range []lab.ServiceSpec{w.shop, w.redis, w.db, w.plain} {
		if err := w.lab.SetService(s); err != nil {
			return err
		}
	}
	if err := w.writeXDS(pods); err != nil {
		return err
	}

	// MariaDB needs seconds to make its tables; everything else starts meanwhile.
	var group errgroup.Group
	group.Go(func() error { return startMariaDB(ctx, pods["db"]) })
	for pod, version := range map[string]string{"redis-1": "v1", "redis-2": "v2"} {
		group.Go(func() error { return startRedis(ctx, pods[pod], version) })
	}
	for _, pod := range []string{"v1", "v2", "plain-1", "plain-2"} {
		group.Go(func() error { _, err := pods[pod].StartNginx(ctx, 8080, answer(pod)); return err })
	}
	group.Go(func() error {
		if _, err := w.lab.StartControl(ctx); err != nil {
			return err
		}
		return w.startAgent(ctx)
	})
	return group.Wait()
}

// startAgent returns when the agent is ready and has all that the folders hold.
func (w *world) startAgent(ctx context.Context) error {
	var err error
	if w.agent, err = w.lab.StartAgent(ctx); err != nil {
		return err
	}
	return w.lab.WaitStatus(ctx, "three listeners and one enrolled pod", func(s lab.Status) bool {
		return s.XDS.Resources["listener"] == 3 && s.Pods.Enrolled == 1 && s.Kubernetes.Services == 4
	})
}

func (w *world) pods(names ...string) (map[string]*lab.Pod, error) {
	pods := map[string]*lab.Pod{}
	for i, name := range names {
		spec := lab.PodSpec{Namespace: "shop", Name: name, Addrs: []netip.Addr{
			netip.MustParseAddr(fmt.Sprintf("10.77.0.%d", 10+i)), netip.MustParseAddr(fmt.Sprintf("fd77::%d", 10+i)),
		}}
		if name == "client" {
			spec.Labels = enrolled
		}
		pod, err := w.lab.AddPod(spec)
		if err != nil {
			return nil, err
		}
		pods[name] = pod
	}
	return pods, nil
}

func (w *world) writeXDS(pods map[string]*lab.Pod) error {
	at := func(pod string, port uint16) []netip.AddrPort {
		return []netip.AddrPort{netip.AddrPortFrom(pods[pod].Addr4(), port)}
	}
	var clusters []lab.Resource
	for name, addrs := range map[string][]netip.AddrPort{
		"shop-v1": at("v1", 8080), "shop-v2": at("v2", 8080),
		"redis-v1": at("redis-1", 6379), "redis-v2": at("redis-2", 6379), "db": at("db", 3306),
	} {
		clusters = append(clusters, lab.Cluster(name), lab.Endpoints(name, addrs...))
	}
	return firstError(
		w.lab.WriteXDS("clusters", clusters...),
		w.setWeights(90, 10),
		w.lab.WriteXDS("listeners",
			lab.HTTPListener("shop", "shop", w.shop.VIP(0), w.shop.VIP(1)),
			lab.TCPListener("redis", []lab.Weight{{Cluster: "redis-v1", Weight: 90}, {Cluster: "redis-v2", Weight: 10}}, "", w.redis.VIP(0), w.redis.VIP(1)),
			// The access log is what keeps this one in the proxy.
			lab.TCPListener("db", []lab.Weight{{Cluster: "db", Weight: 1}}, filepath.Join(w.lab.LogDir(), "db.access.log"), w.db.VIP(0), w.db.VIP(1)),
		),
	)
}

// setWeights writes the shop's routes; the control plane serves them at once.
func (w *world) setWeights(v1, v2 int) error {
	return w.lab.WriteXDS("shop-routes", lab.Routes("shop",
		lab.Route{Header: "x-canary", Value: "always", Clusters: []lab.Weight{{Cluster: "shop-v2", Weight: 1}}},
		lab.Route{Clusters: []lab.Weight{{Cluster: "shop-v1", Weight: v1}, {Cluster: "shop-v2", Weight: v2}}},
	))
}

// answer makes nginx say who it is, whether the proxy was on the way (it adds a request id), and whom it sees.
func answer(name string) string {
	return `location / { set $how proxied; if ($http_x_request_id = "") { set $how direct; } return 200 "` + name + `/$how $remote_addr\n"; }`
}

func startRedis(ctx context.Context, pod *lab.Pod, version string) error {
	proc, err := pod.Start("redis", "redis-server", "--port", "6379", "--bind", "0.0.0.0", "::", "--protected-mode", "no", "--save", "", "--dir", os.TempDir())
	if err != nil {
		return err
	}
	if err := pod.WaitListening(ctx, proc, 6379); err != nil {
		return err
	}
	_, err = pod.Run(ctx, "redis-cli", "set", "version", version)
	return err
}

func startMariaDB(ctx context.Context, pod *lab.Pod) error {
	dir, err := os.MkdirTemp(filepath.Join(filepath.Dir(pod.NetnsPath), "..", "tmp"), "mariadb")
	if err != nil {
		return err
	}
	if _, err := pod.Run(ctx, "mariadb-install-db", "--no-defaults", "--user=root", "--datadir="+dir+"/data",
		"--auth-root-authentication-method=normal", "--skip-test-db"); err != nil {
		return err
	}
	init := filepath.Join(dir, "init.sql")
	if err := os.WriteFile(init, []byte("CREATE USER demo@'%';\n"), 0o644); err != nil {
		return err
	}
	proc, err := pod.Start("mariadb", "mariadbd", "--no-defaults", "--user=root", "--datadir="+dir+"/data", "--init-file="+init,
		"--socket="+dir+"/socket", "--pid-file="+dir+"/pid", "--port=3306", "--bind-address=*", "--skip-name-resolve", "--innodb-buffer-pool-size=8M")
	if err != nil {
		return err
	}
	return pod.WaitListening(ctx, proc, 3306)
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
