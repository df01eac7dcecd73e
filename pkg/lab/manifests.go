package lab

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"
)

// WriteManifest puts Kubernetes objects into the agent's manifests folder as NAME.yaml, in one step: a reader sees
// the old file or the new one.
func (l *Lab) WriteManifest(name string, objects ...any) error {
	return l.write("manifests", name, objects...)
}

// RemoveManifest deletes NAME.yaml.
func (l *Lab) RemoveManifest(name string) error {
	return os.Remove(filepath.Join(l.Dir, "manifests", name+".yaml"))
}

// WriteText puts text as it is into a folder of the lab ("manifests" or "xds"): for what is wrong on purpose.
func (l *Lab) WriteText(folder, file, text string) error {
	tmp, err := os.CreateTemp(filepath.Join(l.Dir, "tmp"), file)
	if err != nil {
		return err
	}
	if _, err = tmp.WriteString(text); err == nil {
		err = tmp.Close()
	}
	if err == nil {
		err = os.Rename(tmp.Name(), filepath.Join(l.Dir, folder, file))
	}
	return err
}

func (l *Lab) write(folder, name string, documents ...any) error {
	var text bytes.Buffer
	for i, d := range documents {
		if i > 0 {
			text.WriteString("---\n")
		}
		y, err := yaml.Marshal(d)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		text.Write(y)
	}
	return l.WriteText(folder, name+".yaml", text.String())
}

// ServiceSpec is a ClusterIP Service with one port and the pods behind it.
type ServiceSpec struct {
	// Namespace is "default" if empty.
	Namespace, Name string
	// ClusterIPs, one per family or both.
	ClusterIPs       []netip.Addr
	Port, TargetPort uint16
	// Protocol is TCP if empty.
	Protocol corev1.Protocol
	Backends []*Pod
}

func (s ServiceSpec) protocol() corev1.Protocol {
	if s.Protocol == "" {
		return corev1.ProtocolTCP
	}
	return s.Protocol
}

// VIP is the Service's address of the given ClusterIP's family.
func (s ServiceSpec) VIP(i int) netip.AddrPort { return netip.AddrPortFrom(s.ClusterIPs[i], s.Port) }

// SetService writes the Service and its EndpointSlices, one per family, as the endpoint slice controller would.
func (l *Lab) SetService(s ServiceSpec) error {
	if s.Namespace == "" {
		s.Namespace = "default"
	}
	return l.WriteManifest(s.manifest(), l.serviceObjects(s)...)
}

// DeleteService removes what SetService wrote.
func (l *Lab) DeleteService(s ServiceSpec) error {
	if s.Namespace == "" {
		s.Namespace = "default"
	}
	return l.RemoveManifest(s.manifest())
}

func (s ServiceSpec) manifest() string { return "service-" + s.Namespace + "_" + s.Name }

func (l *Lab) serviceObjects(s ServiceSpec) []any {
	meta := metav1.ObjectMeta{Namespace: s.Namespace, Name: s.Name, UID: metaUID(s.Namespace + "-" + s.Name)}
	svc := &corev1.Service{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
		ObjectMeta: meta,
		Spec: corev1.ServiceSpec{
			Type:  corev1.ServiceTypeClusterIP,
			Ports: []corev1.ServicePort{{Name: "main", Protocol: s.protocol(), Port: int32(s.Port)}},
		},
	}
	svc.Spec.Ports[0].TargetPort.IntVal = int32(s.TargetPort)
	objects := []any{svc}
	for _, ip := range s.ClusterIPs {
		svc.Spec.ClusterIPs = append(svc.Spec.ClusterIPs, ip.String())
		family, kind := corev1.IPv4Protocol, discoveryv1.AddressTypeIPv4
		if ip.Is6() {
			family, kind = corev1.IPv6Protocol, discoveryv1.AddressTypeIPv6
		}
		svc.Spec.IPFamilies = append(svc.Spec.IPFamilies, family)
		objects = append(objects, l.slice(s, kind))
	}
	svc.Spec.ClusterIP = svc.Spec.ClusterIPs[0]
	return objects
}

// Slices are the Service's EndpointSlices alone, for a Service of another sort than SetService writes.
func (l *Lab) Slices(s ServiceSpec) []any { return l.serviceObjects(s)[1:] }

func (l *Lab) slice(s ServiceSpec, kind discoveryv1.AddressType) *discoveryv1.EndpointSlice {
	yes, no := true, false
	name, proto, port := "main", s.protocol(), int32(s.TargetPort)
	slice := &discoveryv1.EndpointSlice{
		TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: s.Namespace, Name: s.Name + "-" + map[discoveryv1.AddressType]string{discoveryv1.AddressTypeIPv4: "v4", discoveryv1.AddressTypeIPv6: "v6"}[kind],
			Labels: map[string]string{discoveryv1.LabelServiceName: s.Name},
		},
		AddressType: kind,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Protocol: &proto, Port: &port}},
		Endpoints:   []discoveryv1.Endpoint{},
	}
	for _, pod := range s.Backends {
		addr := pod.Addr4()
		if kind == discoveryv1.AddressTypeIPv6 {
			addr = pod.Addr6()
		}
		if !addr.IsValid() {
			continue
		}
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
			Addresses:  []string{addr.String()},
			Conditions: discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes, Terminating: &no},
			NodeName:   &l.cfg.NodeName,
			TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: pod.Namespace, Name: pod.PodSpec.Name},
		})
	}
	return slice
}

func metaUID(s string) types.UID { return types.UID(s) }
