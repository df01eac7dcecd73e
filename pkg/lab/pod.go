package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// PodSpec says what pod is wanted.
type PodSpec struct {
	// Namespace is "default" if empty.
	Namespace, Name string
	// Addrs are its addresses, from the lab's subnets, of either family or both.
	Addrs []netip.Addr
	// Labels and Annotations of the Pod object; the label sockmesh.io/enroll=true lets the proxy take its
	// connections.
	Labels, Annotations map[string]string
}

// Pod is a network namespace on the node's bridge, with a Pod object in the manifests.
type Pod struct {
	Place
	PodSpec
	UID string
}

// AddPod makes a pod and then its Pod object, as a kubelet would.
func (l *Lab) AddPod(spec PodSpec) (*Pod, error) {
	if spec.Namespace == "" {
		spec.Namespace = "default"
	}
	p := &Pod{PodSpec: spec, UID: uuid.NewString()}
	name := spec.Namespace + "/" + spec.Name
	place, err := l.newPlace(name, filepath.Join(l.Dir, "netns", "cni-"+p.UID))
	if err != nil {
		return nil, err
	}
	p.Place = *place
	l.mu.Lock()
	l.pods[name] = p
	l.mu.Unlock()
	if err := os.Symlink(p.NetnsPath, p.link()); err != nil {
		return nil, err
	}
	if err := l.connect(p); err != nil {
		return nil, err
	}
	return p, l.WriteManifest(p.manifest(), p.object(l.cfg.NodeName))
}

// Delete removes the Pod object, ends the pod's processes and removes its namespace.
func (p *Pod) Delete() error {
	l := p.lab
	if err := l.RemoveManifest(p.manifest()); err != nil {
		return err
	}
	l.mu.Lock()
	delete(l.pods, p.Place.Name)
	l.mu.Unlock()
	if err := removeCgroup(p.Cgroup); err != nil {
		return err
	}
	p.netns.Close()
	if err := unix.Unmount(p.NetnsPath, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", p.NetnsPath, err)
	}
	return errors.Join(os.Remove(p.NetnsPath), os.Remove(p.link()))
}

// link is where people find the namespace by the pod's name; under netns/ names are as a container runtime's.
func (p *Pod) link() string { return filepath.Join(p.lab.Dir, "pods", flat(p.Place.Name)) }

// Addr4 is the pod's first IPv4 address, the zero Addr if it has none.
func (p *Pod) Addr4() netip.Addr { return p.first(netip.Addr.Is4) }

// Addr6 is the pod's first IPv6 address, the zero Addr if it has none.
func (p *Pod) Addr6() netip.Addr { return p.first(netip.Addr.Is6) }

func (p *Pod) first(is func(netip.Addr) bool) netip.Addr {
	for _, a := range p.Addrs {
		if is(a) {
			return a
		}
	}
	return netip.Addr{}
}

func (p *Pod) manifest() string { return "pod-" + flat(p.Place.Name) }

func (p *Pod) object(node string) *corev1.Pod {
	pod := &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: p.Namespace, Name: p.PodSpec.Name, UID: metaUID(p.UID), Labels: p.Labels, Annotations: p.Annotations,
		},
		Spec: corev1.PodSpec{
			NodeName: node, ServiceAccountName: "default",
			Containers: []corev1.Container{{Name: "app", Image: "lab"}},
		},
		Status: corev1.PodStatus{
			Phase:      corev1.PodRunning,
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
		},
	}
	for i, a := range p.Addrs {
		if i == 0 {
			pod.Status.PodIP = a.String()
		}
		pod.Status.PodIPs = append(pod.Status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	return pod
}
